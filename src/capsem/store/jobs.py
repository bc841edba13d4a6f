"""`jobs.state` of a checkpoint: the commands of a VM at that instant, as far as its supervisor knew them.

One line of JSON, {"format": 1, "jobs": [...]}, oldest job first; then the bytes of output, as the line tells them. What
a guest wrote beyond that is in its memory, and is sent again from the offsets here. docs/checkpoint-format.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from capsem.model.errors import Corrupt
from capsem.wire.frames import ProtocolError
from capsem.wire.messages import Exited, Failed
from capsem.wire.schema import decode_message, encode_message

FORMAT: Final = 1
OUTPUT_LIMIT: Final = 10 * 1024 * 1024  # bytes of one output, the newest
TOTAL_LIMIT: Final = 32 * 1024 * 1024  # bytes of all, those of the newest jobs
_ENDINGS: Final = {Exited.tag: Exited, Failed.tag: Failed}


@dataclass(frozen=True, slots=True)
class SavedOutput:
    """What is kept of one output: `data` ends where the guest goes on, at `end`."""

    end: int
    data: bytes

    @property
    def start(self) -> int:
        """Offset of the first byte that is kept."""
        return self.end - len(self.data)


@dataclass(frozen=True, slots=True)
class SavedJob:
    """One command; `ended` is how, None while it ran."""

    id: str
    command: str
    stdout: SavedOutput
    stderr: SavedOutput
    ended: Exited | Failed | None = None


def encode(jobs: list[SavedJob]) -> bytes:
    """The content of the file."""
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for job in jobs:
        described.append(
            {
                "id": job.id,
                "command": job.command,
                "stdout": [job.stdout.end, len(job.stdout.data)],
                "stderr": [job.stderr.end, len(job.stderr.data)],
                "ended": None if job.ended is None else json.loads(encode_message(job.ended)),
            }
        )
        parts += [job.stdout.data, job.stderr.data]
    return b"".join((json.dumps({"format": FORMAT, "jobs": described}).encode(), b"\n", *parts))


def decode(content: bytes, *, source: str) -> list[SavedJob]:
    """The jobs in a file. Raises Corrupt naming `source` when it is of another format, or not what was written."""
    head, _, body = content.partition(b"\n")
    at = 0

    def output(end: int, size: int) -> SavedOutput:
        nonlocal at
        data = body[at : at + size]
        if not 0 <= size == len(data) <= end:
            raise ValueError("an output is cut short")
        at += size
        return SavedOutput(end, data)

    try:
        outer = json.loads(head)
        if outer["format"] != FORMAT:
            raise Corrupt(f"{source} has format {str(outer['format'])[:20]}, this version of Capsem reads {FORMAT}")
        jobs = []
        for each in outer["jobs"]:
            ended = each["ended"]
            ending = None if ended is None else decode_message(json.dumps(ended).encode(), _ENDINGS)
            assert ending is None or isinstance(ending, (Exited, Failed))
            stdout, stderr = output(*each["stdout"]), output(*each["stderr"])
            jobs.append(SavedJob(str(each["id"]), str(each["command"]), stdout, stderr, ending))
        if at != len(body):
            raise ValueError(f"{len(body) - at} bytes belong to no job")
    except (LookupError, TypeError, ValueError, RecursionError, ProtocolError) as error:
        raise Corrupt(f"{source} does not hold jobs: {error!r}") from error
    return jobs
