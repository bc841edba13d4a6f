"""jobs.state: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import json

import pytest

from capsem.model.errors import Corrupt
from capsem.store.jobs import SavedJob, SavedOutput, decode, encode
from capsem.wire.messages import Exited, Failed

EMPTY = SavedOutput(0, b"")
JOBS = [
    SavedJob("one", "echo one\n# \u00fc", SavedOutput(4, b"one\n"), EMPTY, Exited(exit_code=3, signal=9, duration=1.5)),
    SavedJob("two", "yes", SavedOutput(1 << 40, bytes(range(256)) * 100), SavedOutput(7, b"\n\n{}\n")),
    SavedJob("three", "true", SavedOutput(5, b""), EMPTY, Failed(code="interrupted", message="gone", hint="look")),
]


@pytest.mark.parametrize("jobs", [[], JOBS[:1], JOBS], ids=len)
def test_round_trip(jobs: list[SavedJob]) -> None:
    assert decode(encode(jobs), source="here") == jobs


def test_offsets_are_absolute() -> None:
    (job,) = decode(encode(JOBS[1:2]), source="here")
    assert (job.stdout.start, job.stdout.end) == ((1 << 40) - 25600, 1 << 40)


def altered(**changes: object) -> bytes:
    head, _, body = encode(JOBS[:1]).partition(b"\n")
    outer = json.loads(head)
    outer["jobs"][0] |= changes
    return json.dumps(outer).encode() + b"\n" + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"[]\n",
        b"{}\n",
        b'{"format": 2, "jobs": []}\n',
        b'{"format": 1}\n',
        encode(JOBS)[:-1],
        encode(JOBS) + b"x",
        altered(stdout=[3, 4]),
        altered(stdout=[4, -1]),
        altered(stdout=[4]),
        altered(stdout=None),
        altered(ended={"t": "ready"}),
        altered(ended={"t": "exited"}),
        altered(ended=7),
    ],
    ids=range(15),
)
def test_what_is_something_else_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(Corrupt, match="here"):
        decode(content, source="here")
