"""The commands of this guest by job id: none is started twice, and none is forgotten before the host has all of it.

A checkpoint may be taken while the end of a command is under way to the host, and what was under way is not in it. So
a command that has ended stays here, with the output that the host has not confirmed, until the host says `Forget`, or
until there are too many.
"""

from __future__ import annotations

from collections import OrderedDict

from capsem.guest.files import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from capsem.guest.processes import Command

_REMEMBERED = 4096  # ids
_ENDED_KEPT = 64  # commands
_ENDED_BYTES = 32 * 1024 * 1024  # of output that they hold in all


class Jobs:
    """All of them."""

    def __init__(self) -> None:
        self._started: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, Command] = {}
        self._ended: OrderedDict[str, Command] = OrderedDict()

    def check_new(self, job: str) -> None:
        """Raises Refused when it was started before."""
        if job in self._started:
            raise Refused("already_exists", f"job {job} was started before")

    def started(self, command: Command) -> None:
        """A command runs."""
        self._running[command.job] = command
        self._started[command.job] = None
        if len(self._started) > _REMEMBERED:
            self._started.popitem(last=False)

    def ended(self, command: Command) -> None:
        """A command has ended; the oldest of those that have go beyond the bounds."""
        self._ended[command.job] = self._running.pop(command.job)
        held = sum(each.held for each in self._ended.values())
        while len(self._ended) > _ENDED_KEPT or held > _ENDED_BYTES:
            _, oldest = self._ended.popitem(last=False)
            held -= oldest.held

    def find(self, job: str) -> Command:
        """A command that runs, or has ended and is still kept. Raises Refused."""
        command = self._running.get(job) or self._ended.get(job)
        if command is None:
            raise Refused("not_found", f"job {job} is not known here")
        return command

    def forget(self, job: str) -> None:
        """The host has all of it; one that still runs stays."""
        self._ended.pop(job, None)
