"""What the documentation says is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import report
from capsem.api import reference as http
from capsem.cli import reference as cli
from capsem.egress import reference as policy
from capsem.mcp import reference as mcp
from capsem.model import lifecycle
from capsem.sdk import reference as sdk

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CAPSEM = Path(sys.executable).parent / "capsem"


@pytest.mark.parametrize(
    ("page", "generate"),
    [
        ("lifecycle.md", lifecycle.to_markdown),
        ("cli.md", cli.to_markdown),
        ("http.md", http.to_markdown),
        ("mcp-tools.md", mcp.to_markdown),
        ("sdk-reference.md", sdk.to_markdown),
        ("policy.md", policy.to_markdown),
        ("benchmarks.md", lambda: report.page(report.results())),
    ],
)
def test_pages_made_from_tables_are_up_to_date(page: str, generate: Callable[[], str]) -> None:
    assert (ROOT / "docs" / page).read_text() == generate(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    """Every `capsem VERB` in a page is a verb of the command line."""
    listed = subprocess.run([CAPSEM, "--help"], capture_output=True, text=True, check=True).stdout
    verbs = set(re.findall(r"^  ([a-z-]+)", listed, re.MULTILINE)) | {"list", "ls", "attach", "rm"}
    for verb in re.findall(r"(?:^    |`)capsem ([a-z-]+)", page.read_text(), re.MULTILINE):
        assert verb in verbs, f"{page.name}: there is no `capsem {verb}`"


@pytest.mark.parametrize("name", ["testing.md", "threat-model.md"])
def test_every_promise_names_a_test_that_there_is(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    rows = [
        row
        for row in text.splitlines()
        if row.startswith("| ") and not row.startswith(("| promise", "| it cannot", "| case"))
    ]
    assert rows
    for row in rows:
        assert re.search(r"`tests/", row.split("|")[-2]), f"no test stands beside: {row}"
    for path in re.findall(r"`(tests/[^`]+)`", text):
        assert (ROOT / path).is_file(), path
    for test, path in re.findall(r"`(test_[^`]+)` in `(tests/[^`]+)`", text):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


@pytest.mark.parametrize("script", ["demo", "test", "lint", "setup.sh"])
def test_scripts_are_plain_shell(script: str) -> None:
    subprocess.run(["sh", "-n", ROOT / "scripts" / script], check=True)


def test_packages_of_the_image_builder_are_among_those_installed() -> None:
    from capsem.image.host import PACKAGE_OF

    names = re.findall(r"^([a-z0-9-]+)", (ROOT / "scripts/packages.txt").read_text(), re.MULTILINE)
    essential = {"coreutils", "tar", "util-linux"}  # on every Debian
    optional = {"lz4", "uidmap"}  # for other kernels, and for building without root
    assert set(PACKAGE_OF.values()) <= {*names, *essential, *optional}


@pytest.mark.parametrize("name", ["ten_lines", "ten_lines_async"])
def test_the_guide_to_the_sdk_shows_the_examples_as_they_are(name: str) -> None:
    page = (ROOT / "docs/sdk.md").read_text()
    assert f"```python\n{(ROOT / f'examples/{name}.py').read_text()}```" in page
