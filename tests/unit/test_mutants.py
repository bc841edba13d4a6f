"""The mutants do not rot: each still applies, is Python, and names tests that there are. `make mutants` runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import capsem
from mutants import MUTANTS, ROOT, Mutant, apply


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant, tmp_path: Path) -> None:
    target = tmp_path / mutant.file
    target.parent.mkdir(parents=True)
    before = (Path(capsem.__file__).parent / mutant.file).read_text()
    target.write_text(before)
    apply(mutant, tmp_path)
    assert target.read_text() != before
    ast.parse(target.read_text())
    with pytest.raises(LookupError, match=mutant.name):
        apply(mutant._replace(old=mutant.old + "no such text"), tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_tests_exist(mutant: Mutant) -> None:
    for test in mutant.tests.split():
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_their_names_are_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
