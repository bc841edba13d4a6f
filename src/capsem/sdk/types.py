"""What the SDK hands out beside the answers of `api.types`: output, results, and the error of a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from capsem.model.errors import CapsemError


class Output(NamedTuple):
    """A piece of what a command wrote, as it came: it may end in the middle of a line or of a character."""

    channel: Literal["stdout", "stderr"]
    data: bytes

    @property
    def text(self) -> str:
        """The bytes as UTF-8; what is none is replaced."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True)
class Result:
    """How a command ended. `truncated`: some of its output was dropped. `signal` is the one that ended it, if one did;
    `job` is its id in the VM.
    """

    stdout: str
    stderr: str
    exit_code: int
    truncated: bool = False
    signal: int | None = None
    job: str | None = None

    @classmethod
    def of(cls, stdout: bytes, stderr: bytes, ended: Mapping[str, Any]) -> Result:
        """From output and an ExecResult."""
        return cls(
            stdout.decode(errors="replace"),
            stderr.decode(errors="replace"),
            int(ended["exit_code"]),
            bool(ended.get("truncated", False)),
            ended.get("signal"),
            ended.get("job"),
        )

    @property
    def ok(self) -> bool:
        """Whether its exit code is 0."""
        return self.exit_code == 0

    def check(self) -> Result:
        """This result again. Raises CommandFailed when the exit code is not 0."""
        if not self.ok:
            raise CommandFailed(self)
        return self


class CommandFailed(CapsemError):
    """A command ended with another exit code than 0, and the caller had asked for an error then."""

    code = "command_failed"

    def __init__(self, result: Result) -> None:
        how = f"was ended by signal {result.signal}" if result.signal else f"ended with exit code {result.exit_code}"
        said = result.stderr.strip().splitlines()
        super().__init__(
            f"the command {how}" + (f": {said[-1][:200]}" if said else ""),
            hint="the error's `result` holds its whole output",
        )
        self.result = result
