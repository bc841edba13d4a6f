"""The host's authority in the guest's bundle: there once, alone of ours, and beside what others put there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capsem.guest.trust import Trust
from capsem.wire.environment import AUTHORITY, BUNDLE


def certificate(text: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n"


OTHERS = certificate("AAAA") + certificate("BBBB")
OURS, ANOTHER = certificate("CCCC"), certificate("DDDD")


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.bundle, self.authority = Path(self.root + BUNDLE), Path(self.root + AUTHORITY)
        self.bundle.parent.mkdir(parents=True)
        self.bundle.write_text(OTHERS)

    def trust(self, text: str) -> dict[str, int]:
        """As an agent that was started anew."""
        return Trust(self.root).trust(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_it_is_added_once(machine: Machine) -> None:
    assert machine.trust(OURS) == {str(machine.bundle): len(OTHERS + OURS), str(machine.authority): len(OURS)}
    assert machine.bundle.read_text() == OTHERS + OURS
    assert machine.authority.read_text() == OURS
    assert machine.trust(OURS) == {}
    assert machine.bundle.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in machine.bundle.parent.iterdir()] == [machine.bundle.name]


def test_another_hosts_takes_its_place(machine: Machine) -> None:
    machine.trust(OURS)
    machine.bundle.write_text(machine.bundle.read_text() + certificate("EEEE"))
    machine.trust(ANOTHER)
    assert machine.bundle.read_text() == OTHERS + certificate("EEEE") + ANOTHER
    assert machine.authority.read_text() == ANOTHER


def test_a_bundle_that_was_made_anew_is_completed(machine: Machine) -> None:
    machine.trust(OURS)
    machine.bundle.write_text(OTHERS.rstrip("\n"))
    machine.trust(OURS)
    assert machine.bundle.read_text() == OTHERS + OURS
    os.unlink(machine.bundle)
    machine.trust(OURS)
    assert machine.bundle.read_text() == OURS


def test_cut_off_in_the_middle_it_is_put_right(machine: Machine) -> None:
    machine.trust(OURS)
    machine.bundle.write_text(OTHERS + ANOTHER)  # as far as it had come
    machine.trust(ANOTHER)
    assert machine.bundle.read_text() == OTHERS + ANOTHER
    assert machine.authority.read_text() == ANOTHER


def test_an_agent_that_knows_reads_nothing(machine: Machine) -> None:
    trust = Trust(machine.root)
    trust.trust(OURS)
    os.unlink(machine.bundle)
    assert trust.trust(OURS) == {}
    assert not machine.bundle.exists()


def test_bytes_that_are_no_text_stay(machine: Machine) -> None:
    machine.bundle.write_bytes(b"\xff\xfe# caf\xc3\xa9\r\n" + OTHERS.encode())
    machine.trust(OURS)
    assert machine.bundle.read_bytes() == b"\xff\xfe# caf\xc3\xa9\r\n" + (OTHERS + OURS).encode()
