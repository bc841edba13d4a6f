"""Everything at once, for one VM and for its siblings: every call is answered, as what it is, and the states are right."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from witness import machines

from capsem.client.sync import Client
from capsem.model.errors import (
    CapsemError,
    Interrupted,
    InvalidInput,
    MachineFailed,
    NotFound,
    NotRunning,
    TimedOut,
    Unavailable,
    WrongState,
)
from real_service import SMALL, Service

VM, SIBLING = "busy", "sibling"
# What a VM may say that is being suspended, stopped or deleted at the same time.
MEANWHILE = (NotRunning, NotFound, Interrupted, WrongState, Unavailable, MachineFailed)


@pytest.fixture(scope="module")
def pair(service: Service) -> Iterator[None]:
    """Two VMs of one checkpoint."""
    client = service.client
    client.call("provision", body={"name": VM, "persistent": True, "disk_mb": 2048, **SMALL})
    service.output(VM, "echo here | tee /root/note >/dev/shm/note; sync")
    client.call("fork", vm_id=VM, body={"name": SIBLING, "live": True})
    yield
    for name in (VM, SIBLING):
        client.call("delete", vm_id=name)


def at_once(service: Service, *calls: tuple[str, str, dict[str, object]]) -> list[object]:
    """Answers, or the typed errors in their places; a bare CapsemError is an accident of ours, not an answer."""

    def one(call: tuple[str, str, dict[str, object]]) -> object:
        operation, vm_id, body = call
        try:
            return Client(service.socket).call(operation, vm_id=vm_id, body=body or None)
        except CapsemError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(one, calls))
    assert not any(type(each) is CapsemError or isinstance(each, TimedOut) for each in answers), answers
    return answers


def settled(service: Service, vm_id: str, status: str) -> None:
    assert service.status(vm_id) == status
    if status != "Running":
        assert not any(f"/{vm_id}/" in line or f"{vm_id}," in line for line in machines(service).values())


def test_two_suspends_and_what_comes_with_them(service: Service, pair: None) -> None:
    answers = at_once(
        service,
        ("suspend", VM, {}),
        ("suspend", VM, {}),
        ("exec", VM, {"command": "cat /root/note"}),
        ("read_file", VM, {"path": "/root/note"}),
        ("suspend", SIBLING, {}),
        ("exec", SIBLING, {"command": "true"}),
    )
    first = [each for each in answers[:2] if isinstance(each, dict)]
    assert len(first) == 1, answers
    assert isinstance(next(each for each in answers[:2] if not isinstance(each, dict)), (NotRunning, WrongState)), (
        answers
    )
    for each in answers[2:4] + answers[5:]:
        assert isinstance(each, (dict, *MEANWHILE)), answers
    assert isinstance(answers[4], dict)
    settled(service, VM, "Suspended")
    settled(service, SIBLING, "Suspended")
    both = at_once(service, ("resume", VM, {}), ("resume", SIBLING, {}), ("resume", VM, {}))
    assert [each["boot_kind"] for each in both] == ["warm"] * 3, both  # type: ignore[index]
    for name in (VM, SIBLING):
        assert service.output(name, "cat /root/note /dev/shm/note") == "here\nhere\n"


def test_checkpoints_and_forks_of_one_vm_take_turns(service: Service, pair: None) -> None:
    answers = at_once(
        service,
        ("checkpoint", VM, {"message": "a"}),
        ("checkpoint", VM, {"message": "b"}),
        ("fork", VM, {"name": "cold-one"}),
        ("fork", VM, {"name": "live-one", "live": True}),
        ("checkpoint", SIBLING, {}),
        ("exec", VM, {"command": "echo still here"}),
    )
    assert all(isinstance(each, dict) for each in answers), answers
    assert service.output("live-one", "cat /dev/shm/note") == "here\n"
    at_once(service, ("delete", "cold-one", {}), ("delete", "live-one", {}))
    for name in (VM, SIBLING):
        made = [each["id"] for each in service.client.call("checkpoints", vm_id=name)["checkpoints"]]
        assert len(made) == (2 if name == VM else 1)
        settled(service, name, "Running")
        for each in made:
            service.client.call("verify_checkpoint", vm_id=name, body={"checkpoint": each})
        service.client.call("suspend", vm_id=name)  # needs none of them
        removed = at_once(service, *(("remove_checkpoint", name, {"checkpoint": each}) for each in made))
        assert all(isinstance(each, dict) for each in removed), removed
        assert service.client.call("resume", vm_id=name)["boot_kind"] == "warm"
        assert service.output(name, "cat /root/note /dev/shm/note") == "here\nhere\n"


def test_suspend_against_stop(service: Service, pair: None) -> None:
    suspended, stopped, _ = at_once(service, ("suspend", VM, {}), ("stop", VM, {}), ("suspend", SIBLING, {}))
    assert sum(isinstance(each, dict) for each in (suspended, stopped)) == 1, (suspended, stopped)
    settled(service, VM, "Suspended" if isinstance(suspended, dict) else "Stopped")
    settled(service, SIBLING, "Suspended")
    at_once(service, ("resume", VM, {}), ("resume", SIBLING, {}))
    for name in (VM, SIBLING):
        settled(service, name, "Running")
        assert service.output(name, "cat /root/note") == "here\n"


def test_suspend_and_resume_again_and_again(service: Service, pair: None) -> None:
    service.output(VM, "echo here >/dev/shm/note")
    calls = [(operation, name, {}) for _ in range(3) for name in (VM, SIBLING) for operation in ("suspend", "resume")]
    answers = at_once(service, *calls)  # type: ignore[arg-type]
    assert all(isinstance(each, (dict, NotRunning, WrongState)) for each in answers), answers
    for name in (VM, SIBLING):
        service.client.call("resume", vm_id=name)
        assert service.output(name, "cat /root/note /dev/shm/note") == "here\nhere\n"


def test_suspend_against_delete(service: Service, pair: None) -> None:
    service.client.call("fork", vm_id=VM, body={"name": "doomed", "live": True})
    suspended, deleted, again = at_once(
        service, ("suspend", "doomed", {}), ("delete", "doomed", {}), ("delete", "doomed", {})
    )
    assert isinstance(suspended, (dict, NotFound)), suspended
    assert sum(isinstance(each, dict) for each in (deleted, again)) == 1, (deleted, again)
    with pytest.raises(NotFound):
        service.client.call("info", vm_id="doomed")
    with pytest.raises((NotFound, InvalidInput)):
        service.client.call("resume", vm_id="doomed")
    assert not any("doomed" in line for line in machines(service).values())
    assert service.output(VM, "cat /root/note") == "here\n"
