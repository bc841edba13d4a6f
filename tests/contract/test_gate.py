"""Who passes the gate when, in one service and between several: fair, visible, bounded, and never held by the dead."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sim_world import sim_world

from capsem.model.errors import CapsemError, HostNotReady, Interrupted, Unavailable
from capsem.service import gate as gates
from capsem.service.app import build_app
from capsem.service.gate import VISIT, Gate, Visit
from capsem.store.gate import HostLock, default_path
from capsem.store.locks import try_lock
from capsem.system.real import RealClock


class Seen:
    """Stands for a VM: what it was seen to wait for."""

    def __init__(self, vm_id: str = "box") -> None:
        self.id = vm_id
        self.running = True
        self.waiting: str | None = None

    def wait_for(self, what: str | None) -> None:
        self.waiting = what


def vm(name: str = "box") -> Any:
    return Seen(name)


def gate(path: Path | None, *, overlap: bool = False, bound: int = 8) -> Gate:
    return Gate(RealClock(), overlap=overlap, path=path, bound=bound)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scene()

    asyncio.run(limited())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def test_alone_is_alone_and_together_is_together(tmp_path: Path) -> None:
    async def scene() -> None:
        one = gate(tmp_path / "lock")
        first, second = await one.boot(vm()), await one.boot(vm())
        waits = vm()
        entered = asyncio.Event()

        async def save() -> None:
            async with one.change(waits, "suspend"):
                entered.set()

        saving = asyncio.create_task(save())
        await settle()
        assert "waits to suspend" in waits.waiting
        first.release()
        await settle()
        assert not entered.is_set()
        second.release()
        await saving
        assert entered.is_set()
        assert waits.waiting is None

    play(scene)


@pytest.mark.parametrize("services", [1, 2])
def test_who_would_go_alone_is_not_starved_by_those_who_go_together(tmp_path: Path, services: int) -> None:
    """Boots that overlap without end: whoever comes after the save began to wait gets in after it."""

    async def scene() -> None:
        one = gate(tmp_path / "lock")
        other = gate(tmp_path / "lock") if services == 2 else one
        order: list[str] = []
        first = await other.boot(vm("first"))

        async def save() -> None:
            async with one.change(waiting, "suspend"):
                order.append("save")

        async def boot() -> None:
            passed = await other.boot(late)
            order.append("late")
            passed.release()

        waiting, late = vm("save"), vm("late")
        saving = asyncio.create_task(save())
        await until(lambda: waiting.waiting and (services == 1 or try_turn(tmp_path / "lock.turn")))
        booting = asyncio.create_task(boot())
        await until(lambda: late.waiting)
        first.release()
        await asyncio.gather(saving, booting)
        assert order == ["save", "late"]

    play(scene)


def try_turn(path: Path) -> bool:
    """Whether somebody waits with the turn in hand."""
    lock = try_lock(path)
    if lock is not None:
        lock.release()
    return lock is None


def test_another_process_that_dies_frees_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from capsem.store.locks import try_lock;"
        "lock = try_lock(Path(sys.argv[1])); print(lock is not None, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"True\n"

        async def scene() -> None:
            waiting = vm()
            entering = asyncio.create_task(gate(tmp_path / "lock").boot(waiting))
            await until(lambda: waiting.waiting)
            os.kill(child.pid, signal.SIGKILL)
            (await entering).release()

        play(scene)


@pytest.mark.parametrize("alone", [True, False])
def test_who_is_at_work_for_a_service_that_died_keeps_others_out(tmp_path: Path, *, alone: bool) -> None:
    async def scene() -> None:
        service = HostLock(tmp_path / "lock")
        passed = await service.take(shared=not alone)
        supervisor = await service.work(shared=not alone, limit=1)
        passed.release()
        if not alone:
            (await gate(tmp_path / "lock").boot(vm())).release()
        waiting = vm()
        entering = asyncio.create_task(gate(tmp_path / "lock").change(waiting, "suspend").__aenter__())
        await until(lambda: waiting.waiting)
        await asyncio.sleep(0.1)
        assert not entering.done()
        supervisor.release()
        (await entering).release()

    play(scene)


def test_one_at_work_does_not_wait_for_another_for_ever(tmp_path: Path) -> None:
    async def scene() -> None:
        held = await HostLock(tmp_path / "lock").work(shared=False, limit=1)
        with pytest.raises(Unavailable, match="another VM"):
            await HostLock(tmp_path / "lock").work(shared=True, limit=0.1)
        held.release()

    play(scene)


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "LIMIT", 0.1)

    async def scene() -> None:
        one, other = gate(tmp_path / "lock"), gate(tmp_path / "lock")
        async with one.change(vm(), "suspend"):
            for each in (one, other):
                with pytest.raises(Unavailable, match="waited") as caught:
                    await each.boot(vm())
                assert caught.value.retry_after > 0
        for each in (one, other):  # who gave up is not in anybody's way
            async with each.change(vm(), "suspend"):
                pass

    play(scene)


@pytest.mark.parametrize("same", [True, False])
def test_a_client_that_goes_away_waits_no_more_and_its_wait_is_known(tmp_path: Path, *, same: bool) -> None:
    async def scene() -> None:
        one = gate(tmp_path / "lock")
        other = one if same else gate(tmp_path / "lock")
        visit = Visit()
        VISIT.set(visit)
        async with one.change(vm(), "suspend"):
            waiting = vm()
            entering = asyncio.create_task(other.boot(waiting))
            await until(lambda: waiting.waiting)
            visit.leave()
            with pytest.raises(Interrupted, match="nothing was done"):
                await entering
            assert visit.waited > 0
            assert waiting.waiting is None
        VISIT.set(None)
        async with other.change(vm(), "suspend"):
            pass

    play(scene)


def test_one_who_is_cancelled_leaves_no_trace(tmp_path: Path) -> None:
    async def scene() -> None:
        one = gate(tmp_path / "lock")
        for delay in (0.0, 0.001, 0.06):
            async with one.change(vm(), "suspend"):
                entering = asyncio.create_task(one.boot(vm()))
                await asyncio.sleep(delay)
                entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            entering = asyncio.create_task(one.boot(vm()))
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)
            async with one.change(vm(), "suspend"):
                pass

    play(scene)


def test_a_hypervisor_that_tolerates_it_is_bound_in_number_alone(tmp_path: Path) -> None:
    async def scene() -> None:
        one = gate(tmp_path / "lock", overlap=True, bound=2)
        first, second = await one.boot(vm()), await one.boot(vm())
        waiting = vm()
        third = asyncio.create_task(one.boot(waiting))
        await until(lambda: waiting.waiting)
        async with one.teardown(vm()):  # must not wait for what it may be there to end
            pass
        second.release()
        (await third).release()
        first.release()
        assert not (tmp_path / "lock").exists()

    play(scene)


def test_a_vm_that_boots_is_ended_from_inside(tmp_path: Path) -> None:
    async def scene() -> None:
        one, booting = gate(tmp_path / "lock"), vm()
        passed = await one.boot(booting)
        saving = asyncio.create_task(one.change(vm(), "suspend").__aenter__())
        await settle()
        async with one.teardown(booting):
            passed.release()  # it is ready, just as it is ended
            await settle()
            assert not saving.done()
        (await saving).release()

    play(scene)


def test_a_lock_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")

    async def scene() -> None:
        with pytest.raises(HostNotReady, match="CAPSEM_GATE"):
            await gate(tmp_path / "lock").boot(vm())

    play(scene)


def test_the_path_is_the_contracts_whatever_the_home(tmp_path: Path) -> None:
    assert default_path({"CAPSEM_HOME": str(tmp_path)}) == Path(f"/tmp/capsem-vz-save-restore-{os.getuid()}.lock")
    assert default_path({"CAPSEM_GATE": str(tmp_path)}) == tmp_path
    assert default_path({"CAPSEM_GATE": "off"}) is None


def test_who_waits_is_listed_with_the_reason_and_served_in_the_end(tmp_path: Path) -> None:
    async def scene() -> None:
        async with sim_world(tmp_path) as world:
            await world.create("box")
            await until(lambda: not world.gate.booting)
            held = try_lock(tmp_path / "gate.lock")
            assert held is not None
            suspending = asyncio.create_task(world.handlers.suspend("box"))
            await until(lambda: world.fleet.get("box").waiting)
            listed = (await world.handlers.list()).sandboxes[0]
            assert listed.status == "Running"
            assert listed.waiting is not None
            assert "waits to suspend" in listed.waiting
            held.release()
            assert (await suspending).success
            assert (await world.handlers.info("box")).waiting is None

    play(scene)


def test_a_guest_that_switches_itself_off_waits_too_unless_somebody_ends_it(tmp_path: Path) -> None:
    async def scene() -> None:
        async with sim_world(tmp_path) as world:
            for name in ("box", "other"):
                await world.create(name)
                await until(lambda: not world.gate.booting)
            held = try_lock(tmp_path / "gate.lock")
            assert held is not None
            for name in ("box", "other"):
                await world.sh(name, "poweroff")
            await until(lambda: try_turn(tmp_path / "gate.lock.turn"))
            await asyncio.sleep(0.2)
            assert [world.fleet.get(name).running for name in ("box", "other")] == [True, True]
            held.release()
            await until(lambda: not world.fleet.get("box").running and not world.fleet.get("other").running)
            assert (await world.handlers.info("box")).status == "Stopped"

    play(scene)


def test_an_answer_tells_how_long_it_waited_and_a_503_when_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "LIMIT", 0.3)

    async def scene() -> None:
        async with sim_world(tmp_path) as world:
            await world.create("box")
            await until(lambda: not world.gate.booting)
            app = build_app(world.handlers, "1")
            held = try_lock(tmp_path / "gate.lock")
            assert held is not None
            refused = await call(app, "/suspend/box")
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert (await world.handlers.info("box")).status == "Running"
            waiting = asyncio.create_task(call(app, "/suspend/box"))
            await until(lambda: world.fleet.get("box").waiting)
            held.release()
            assert json.loads((await waiting).body)["waited_ms"] > 0

    play(scene)


def test_a_client_that_hangs_up_takes_its_suspend_back_while_it_waits(tmp_path: Path) -> None:
    async def scene() -> None:
        async with sim_world(tmp_path) as world:
            await world.create("box")
            await until(lambda: not world.gate.booting)
            app = build_app(world.handlers, "1")
            held = try_lock(tmp_path / "gate.lock")
            assert held is not None
            gone = asyncio.Event()
            calling = asyncio.create_task(call(app, "/suspend/box", gone))
            await until(lambda: world.fleet.get("box").waiting)
            gone.set()
            await calling
            await until(lambda: not app.state.transitions)
            held.release()
            box = await world.handlers.info("box")
            assert (box.status, box.waiting) == ("Running", None)

    play(scene)


def test_what_a_guest_asks_for_is_no_part_of_the_request_that_started_it(tmp_path: Path) -> None:
    async def scene() -> None:
        async with sim_world(tmp_path) as world:
            visit = Visit()
            VISIT.set(visit)
            await world.create("box")
            visit.leave()  # the client that started it hung up
            VISIT.set(None)
            await until(lambda: not world.gate.booting)
            held = try_lock(tmp_path / "gate.lock")
            assert held is not None
            await world.sh("box", "suspend")
            await until(lambda: world.fleet.get("box").waiting)
            held.release()
            await until(lambda: not world.fleet.get("box").running)
            assert (await world.handlers.info("box")).status == "Suspended"

    play(scene)


def test_a_guest_that_waits_to_be_off_is_in_nobodys_way(tmp_path: Path) -> None:
    """Its suspend is inside of the gate, and has to be refused at once: else each would wait for the other."""

    async def scene() -> None:
        async with sim_world(tmp_path) as world:
            await world.create("box")
            await until(lambda: not world.gate.booting)
            async with world.gate.change(vm(), "suspend"):
                await world.sh("box", "poweroff")
                await until(lambda: try_turn(tmp_path / "gate.lock.turn"))
                suspending = asyncio.create_task(world.handlers.suspend("box"))
                await until(lambda: world.fleet.get("box").waiting)
            with pytest.raises(CapsemError):
                await suspending
            await until(lambda: not world.fleet.get("box").running)

    play(scene)


class Answer:
    status = 0
    headers: dict[str, str]
    body = b""


async def call(app: Any, path: str, gone: asyncio.Event | None = None) -> Answer:
    """POST as an HTTP server would; `gone`: when its client hangs up."""
    answer, asked = Answer(), False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            answer.body += message["body"]

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "root_path": "",
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return answer
