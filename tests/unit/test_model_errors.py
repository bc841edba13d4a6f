"""Errors: one tree, stable codes, and the way across a process boundary."""

import json

import pytest

from capsem.model import errors
from capsem.model.errors import BY_CODE, CapsemError, Unavailable, from_dict


def _tree(base: type[CapsemError]) -> list[type[CapsemError]]:
    return [base, *(each for sub in base.__subclasses__() for each in _tree(sub))]


# Subclasses may be made elsewhere (by tests); what counts is this module.
EVERY = [cls for cls in _tree(CapsemError) if cls.__module__ == errors.__name__]


def test_codes_are_unique_and_complete() -> None:
    assert len({cls.code for cls in EVERY}) == len(EVERY)
    assert {cls.code: cls for cls in EVERY} == BY_CODE


def test_every_class_says_its_own_code() -> None:
    for cls in EVERY:
        assert "code" in vars(cls)


def test_codes_are_stable() -> None:
    """Clients compare these: a change here is a change of the contract."""
    assert {code: cls.status for code, cls in BY_CODE.items()} == {
        "internal": 500,
        "invalid_input": 400,
        "payload_too_large": 413,
        "permission_denied": 403,
        "not_found": 404,
        "tool_failed": 502,
        "not_running": 404,
        "already_exists": 409,
        "wrong_state": 409,
        "limit_reached": 429,
        "unavailable": 503,
        "timed_out": 500,
        "interrupted": 500,
        "guest_failed": 500,
        "machine_failed": 500,
        "host_not_ready": 500,
        "query_failed": 500,
        "corrupt": 500,
        "unsupported": 409,
    }


def test_the_docstring_draws_every_class_with_its_status() -> None:
    drawn = {line.split("+-- ")[1].split()[0]: line for line in (errors.__doc__ or "").splitlines() if "+-- " in line}
    assert set(drawn) == {cls.__name__ for cls in EVERY} - {"CapsemError"}
    for cls in EVERY[1:]:
        assert f" {cls.status} " in drawn[cls.__name__]


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.code)
@pytest.mark.parametrize("hint", [None, "do this"])
def test_round_trip(cls: type[CapsemError], hint: str | None) -> None:
    error = cls("what happened", hint=hint)
    body = json.loads(json.dumps(error.to_dict()))
    assert body["error"] == str(error)
    again = from_dict(body)
    assert type(again) is cls
    assert (again.message, again.hint, str(again)) == (error.message, error.hint, str(error))
    assert from_dict(again.to_dict()).to_dict() == body


def test_retry_after_survives_the_round_trip() -> None:
    again = from_dict(json.loads(json.dumps(Unavailable("busy", retry_after=7.5).to_dict())))
    assert isinstance(again, Unavailable)
    assert again.retry_after == 7.5


def test_a_newer_peers_code_becomes_the_base_class() -> None:
    error = from_dict({"code": "from_the_future", "message": "boo", "hint": "upgrade"})
    assert type(error) is CapsemError
    assert str(error) == "boo (upgrade)"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"error": "only the contract's key"},
        {"code": 7, "message": 8, "hint": ["x"]},
        {"code": None, "message": None},
        {"code": "unavailable", "message": "m", "retry_after": "soon"},
        {"code": "unavailable", "message": "m", "retry_after": None},
    ],
)
def test_whatever_a_peer_says_makes_an_error(body: dict[str, object]) -> None:
    error = from_dict(body)
    assert isinstance(error, CapsemError)
    assert error.message
    json.dumps(error.to_dict())


def test_exit_codes_are_nonzero() -> None:
    for cls in EVERY:
        assert 0 < cls.exit_code < 126
