"""How an ended QEMU is read."""

from __future__ import annotations

from typing import Any

import pytest

from capsem.hypervisor.qemu.machine import Record, ending
from capsem.hypervisor.qemu.qmp import Event


def told(*events: tuple[str, dict[str, Any]]) -> Record:
    record = Record()
    for name, data in events:
        record.note(Event(name, data))
    return record


POWER_OFF = ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
RESET = ("SHUTDOWN", {"guest": True, "reason": "guest-reset"})
QUIT = ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
PANIC = ("GUEST_PANICKED", {"action": "shutdown"})


@pytest.mark.parametrize(
    ("status", "killed", "events", "clean", "words"),
    [
        (0, False, [POWER_OFF], True, "powered off"),
        (0, False, [QUIT], True, "asked to quit"),
        (0, False, [RESET], False, "reset itself"),
        (0, False, [PANIC, ("SHUTDOWN", {"guest": True, "reason": "guest-panic"})], False, "panicked"),
        (0, False, [PANIC, RESET], False, "panicked"),
        (0, False, [("SHUTDOWN", {"guest": False, "reason": "host-signal"})], False, "from outside"),
        (0, False, [("SHUTDOWN", {"reason": "something new"})], False, "status 0"),
        (0, False, [], False, "status 0"),
        (1, False, [POWER_OFF], False, "status 1: last words"),
        (-9, False, [POWER_OFF], False, "signal 9"),
        (-11, False, [], False, "signal 11 (Segmentation fault): last words"),
        (-9, True, [], False, "on request"),
    ],
)
def test_endings(status: int, killed: bool, events: list[tuple[str, dict[str, Any]]], clean: bool, words: str) -> None:
    how = ending(status, killed=killed, record=told(*events), words="last words")
    assert how.clean is clean
    assert words in how.reason


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert told(("BLOCK_IO_ERROR", {"nospace": True, "action": "stop"})).out_of_space.is_set()
    assert not told(("BLOCK_IO_ERROR", {"nospace": False, "action": "report"})).out_of_space.is_set()
