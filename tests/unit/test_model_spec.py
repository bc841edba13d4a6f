"""What may be asked for when a VM is made."""

import dataclasses
from types import MappingProxyType

import pytest

from capsem.model import spec
from capsem.model.errors import InvalidInput
from capsem.model.spec import VmSpec, check_env
from capsem.wire.environment import BLOCKED_ENV


def test_defaults_are_legal_and_as_documented() -> None:
    default = VmSpec()
    assert (default.cpus, default.ram_mb, default.disk_mb, dict(default.env)) == (4, 4096, 16384, {})


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VmSpec().cpus = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        VmSpec().env["A"] = "b"  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "low", "high"), [("cpus", 1, 8), ("ram_mb", 256, 16384), ("disk_mb", 512, 1024 * 1024)]
)
def test_ranges_hold_at_both_ends(field: str, low: int, high: int) -> None:
    for good in (low, high):
        assert getattr(VmSpec(**{field: good}), field) == good
    for bad in (low - 1, high + 1, 0, -1, 10**30):
        with pytest.raises(InvalidInput) as caught:
            VmSpec(**{field: bad})
        assert field in caught.value.message
        assert str(low) in (caught.value.hint or "")
        assert str(high) in (caught.value.hint or "")


@pytest.mark.parametrize(
    "env",
    [
        {"A": ""},
        {"lower_case": "ü", "WITH SPACE": "x=y\nz"},
        {"A" * spec.ENV_KEY_BYTES: "x"},
        {"A": "x" * (spec.ENV_ENTRY_BYTES - len("A=\0"))},
        {f"A{i}": "" for i in range(spec.ENV_VARS)},
        {"ld_preload": "is not LD_PRELOAD"},
        {"A": "\udc80"},  # what Python makes of a byte that is not UTF-8
    ],
    ids=range(7),
)
def test_good_environments(env: dict[str, str]) -> None:
    check_env(env)
    assert dict(VmSpec(env=MappingProxyType(env)).env) == env


@pytest.mark.parametrize(
    "env",
    [
        {"": "x"},
        {"A=B": "x"},
        {"A\0": "x"},
        {"A": "x\0"},
        {"A" * (spec.ENV_KEY_BYTES + 1): "x"},
        {"ü" * (spec.ENV_KEY_BYTES // 2 + 1): "counted in bytes"},
        {"A": "x" * (spec.ENV_ENTRY_BYTES - len("A=\0") + 1)},
        {"A": "ü" * (spec.ENV_ENTRY_BYTES // 2)},
        {f"A{i}": "" for i in range(spec.ENV_VARS + 1)},
        {f"A{i}": "x" * 100_000 for i in range(spec.ENV_TOTAL_BYTES // 100_000 + 1)},
        *({name: "x"} for name in sorted(BLOCKED_ENV)),
    ],
    ids=range(10 + len(BLOCKED_ENV)),
)
def test_bad_environments(env: dict[str, str]) -> None:
    for check in (check_env, lambda env: VmSpec(env=MappingProxyType(env))):
        with pytest.raises(InvalidInput) as caught:
            check(env)
        assert len(str(caught.value)) < 1000


def test_blocked_names_are_those_of_the_contract() -> None:
    """interface.md 6.2."""
    contract = (
        "LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT LD_BIND_NOT LD_DEBUG LD_DYNAMIC_WEAK LD_PROFILE LD_SHOW_AUXV "
        "LD_USE_LOAD_BIAS IFS BASH_ENV ENV CDPATH GLOBIGNORE SHELLOPTS BASHOPTS PROMPT_COMMAND PS4"
    )
    assert set(contract.split()) == BLOCKED_ENV


def test_an_error_shows_no_value_and_no_control_characters() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_env({"TOKEN\x1b[31m" + "x" * 300: "secret"})
    assert "secret" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
