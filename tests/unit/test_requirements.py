"""What the lock files pin installs on the oldest Python that we name, and names no registry."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OLDEST = "3.11.2"  # Debian 12's
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;]+)", re.MULTILINE)


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda lock: lock.stem)
def test_every_pinned_package_runs_on_the_oldest_python(lock: Path) -> None:
    installed = {canonicalize_name(each.name): each for each in importlib.metadata.distributions()}
    pinned = dict(PINNED.findall(lock.read_text()))
    assert len(pinned) > 10
    for name, version in pinned.items():
        found = installed[canonicalize_name(name)]
        assert found.version == version, f"{name} is installed as {found.version}: run scripts/test once"
        assert SpecifierSet(found.metadata.get_all("Requires-Python", [""])[0]).contains(OLDEST), (name, version)


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda lock: lock.stem)
def test_no_host_is_named(lock: Path) -> None:
    assert not re.search(r"://|index-url|find-links", lock.read_text())
