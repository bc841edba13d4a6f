"""Every error a caller of Capsem can meet, classed by what the caller can do next.

    CapsemError
     +-- InvalidInput         400  the request itself is wrong: change it
     |    +-- PayloadTooLarge 413  send less, or send it as a stream
     +-- PermissionDenied     403  outside what this caller may touch
     +-- NotFound             404  no such VM, path, image or checkpoint
     |    +-- NotRunning      404  the VM exists but does not run: resume it first
     +-- AlreadyExists        409  the name is taken: choose another or delete that one
     +-- WrongState           409  the VM is in a state that does not allow this
     |    +-- Unsupported     409  it is run by a Capsem of another version, which does not do this: stop and resume it
     +-- LimitReached         429  a configured maximum: stop something or raise the setting
     +-- Unavailable          503  busy or not there yet: try again later
     +-- TimedOut             500  a limit the caller set, or one of ours, ran out
     +-- Interrupted          500  the VM was suspended or its agent died meanwhile; the outcome is not known to this call
     +-- GuestFailed          500  the guest said no, or broke
     +-- ToolFailed           502  a tool of another server failed
     +-- MachineFailed        500  the VMM or the host said no, or broke
     +-- HostNotReady         500  something is missing on this host: install it
     +-- QueryFailed          500  the SQL of an inspection is wrong, or asks for more than may be asked: change it
     +-- Corrupt              500  a file does not hold what its record says: nothing was done with it

`code` is stable and machine-readable; `message` says what happened; `hint` says what the reader can do about it.
An error crosses a process boundary as `to_dict()` and comes back by `from_dict()`.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class CapsemError(Exception):
    """Base of all errors that Capsem reports to a caller."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_dict(self) -> dict[str, Any]:
        """The form that travels between processes and to HTTP clients; `error` is the contract's key."""
        body: dict[str, Any] = {"error": str(self), "code": self.code, "message": self.message}
        if self.hint:
            body["hint"] = self.hint
        return body


class InvalidInput(CapsemError):
    """The request itself is wrong; nothing was changed."""

    code, status, exit_code = "invalid_input", 400, 2


class PayloadTooLarge(InvalidInput):
    """The request carries more than this route takes."""

    code, status = "payload_too_large", 413


class PermissionDenied(CapsemError):
    """The path or resource lies outside what the caller may touch."""

    code, status = "permission_denied", 403


class NotFound(CapsemError):
    """No VM, path, image or checkpoint of that name."""

    code, status = "not_found", 404


class NotRunning(NotFound):
    """The VM is known but has no running machine."""

    code = "not_running"


class AlreadyExists(CapsemError):
    """The name is taken."""

    code, status = "already_exists", 409


class WrongState(CapsemError):
    """The VM's state does not allow the operation."""

    code, status = "wrong_state", 409


class Unsupported(WrongState):
    """The other end, a supervisor or a guest agent, is of a version that does not do this or cannot be spoken to."""

    code = "unsupported"


class LimitReached(CapsemError):
    """A configured maximum has been reached."""

    code, status = "limit_reached", 429


class Unavailable(CapsemError):
    """Not now: busy, starting or shutting down. `retry_after` is in seconds."""

    code, status = "unavailable", 503

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after

    def to_dict(self) -> dict[str, Any]:
        """See CapsemError; `retry_after` travels too."""
        return {**super().to_dict(), "retry_after": self.retry_after}


class TimedOut(CapsemError):
    """A time limit ran out."""

    code, exit_code = "timed_out", 124


class Interrupted(CapsemError):
    """The call was cut off; whether it took effect is not known to this call.

    `job` is the command that may go on, under which its output and its end can be fetched.
    """

    code, exit_code = "interrupted", 75  # EX_TEMPFAIL of sysexits.h: not failed, and not done as far as one can tell

    def __init__(self, message: str, *, hint: str | None = None, job: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.job = job

    def to_dict(self) -> dict[str, Any]:
        """See CapsemError; `job` travels too."""
        return {**super().to_dict(), **({"job": self.job} if self.job else {})}


class GuestFailed(CapsemError):
    """The guest refused, or the guest agent broke."""

    code = "guest_failed"


class ToolFailed(CapsemError):
    """A tool of another MCP server failed, or there is none of that name."""

    code, status = "tool_failed", 502


class MachineFailed(CapsemError):
    """The VMM or a host operation refused or broke."""

    code = "machine_failed"


class HostNotReady(CapsemError):
    """Something this host needs is missing or broken."""

    code = "host_not_ready"


class QueryFailed(CapsemError):
    """The SQL of an inspection is wrong, or more than may be asked; the contract's status for it is 500."""

    code, exit_code = "query_failed", 2


class Corrupt(CapsemError):
    """A file is not what its record says it is."""

    code = "corrupt"


def host_failed(what: str, error: OSError) -> MachineFailed:
    """What the kernel refused while `what` was being done, with a hint for the most frequent reason."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return MachineFailed(
        f"{what}: {error.strerror or error}",
        hint="make room: `capsem df` shows what VMs take" if full else "`capsem doctor` checks this host",
    )


def _all(base: type[CapsemError]) -> list[type[CapsemError]]:
    return [base, *(each for sub in base.__subclasses__() for each in _all(sub))]


BY_CODE: dict[str, type[CapsemError]] = {cls.code: cls for cls in _all(CapsemError)}


def from_dict(body: dict[str, Any]) -> CapsemError:
    """The error that `to_dict` described; an unknown code (a newer peer) becomes the base class."""
    cls = BY_CODE.get(str(body.get("code", "")), CapsemError)
    message = body.get("message") or body.get("error") or "unknown error"
    hint = body.get("hint")
    error = cls(str(message), hint=str(hint) if hint else None)
    retry_after = body.get("retry_after")
    if isinstance(error, Unavailable) and isinstance(retry_after, (int, float)):
        error.retry_after = retry_after
    job = body.get("job")
    if isinstance(error, Interrupted) and isinstance(job, str):
        error.job = job
    return error
