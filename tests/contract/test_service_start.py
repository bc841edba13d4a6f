"""What a service that starts makes of what it finds: strangers, spoilt records, a host that was restarted."""

from __future__ import annotations

import asyncio
import json
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from capsem.api.exec_types import ExecRequest
from capsem.api.file_types import ReadFileRequest
from capsem.api.internal import OLDEST_PROTOCOL, PROTOCOL, REQUESTS, Jobs, Stopping
from capsem.api.vm_types import ForkRequest, ProvisionRequest, PurgeRequest, SandboxInfo
from capsem.model.errors import Corrupt, Unavailable, Unsupported
from capsem.service import fleet
from capsem.service.__main__ import _bind
from capsem.service.link import Link
from capsem.store.layout import SessionDir
from capsem.store.locks import Lock, try_lock
from capsem.supervisor import server
from capsem.wire.frames import MAX_DATA, ONE_WRITE
from capsem.wire.schema import Message
from service_world import World, play, status


async def only(it: World) -> SandboxInfo:
    [info] = (await it.handlers.list()).sandboxes
    return info


def test_nobody_else_gets_to_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "service.sock"
    _bind(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# -- versions


@pytest.mark.parametrize("protocol", [OLDEST_PROTOCOL - 1, PROTOCOL + 2])
def test_a_supervisor_of_another_protocol_can_be_seen_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        pid = (await it.handlers.info("box")).pid
        monkeypatch.setattr(server, "PROTOCOL", protocol)
        await it.restart()
        info = await only(it)
        assert (info.status, info.pid, info.last_error) == ("Running", pid, None)
        assert info.reason is not None
        assert f"speaks protocol {protocol}, this service" in info.reason
        assert info.available_actions == ["stop", "delete"]
        handlers = it.handlers
        for call in (
            handlers.execute("box", ExecRequest(command="true")),
            handlers.read_file("box", ReadFileRequest(path="x")),
            handlers.jobs("box"),
            handlers.fork("box", ForkRequest(name="child")),
            handlers.resume("box"),
        ):
            with pytest.raises(Unsupported, match=f"protocol {protocol}") as caught:
                await call
            assert caught.value.status == 409
            assert "stop the VM and resume it" in (caught.value.hint or "")
        await it.fleet.cleared()
        assert len(list(it.layout.layers.glob("*.qcow2"))) == 1  # the fork left nothing

        await handlers.stop("box")
        assert await status(it) == {"box": "Stopped"}
        monkeypatch.setattr(server, "PROTOCOL", PROTOCOL)
        await handlers.resume("box")
        assert (await handlers.execute("box", ExecRequest(command="echo here"))).stdout == "here\n"
        assert (await only(it)).reason is None

    play(tmp_path, scene)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_supervisor_of_another_protocol_can_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=persistent))
        machine = it.driver.machines[0]
        monkeypatch.setattr(server, "PROTOCOL", PROTOCOL + 2)
        await it.restart()
        await it.handlers.delete("box")
        assert await status(it) == {}
        assert machine._process is not None
        assert machine._process.returncode is not None
        await it.fleet.cleared()
        assert not [*it.layout.sessions.iterdir(), *it.layout.persistent.iterdir(), *it.layout.layers.glob("*.qcow2")]

    play(tmp_path, scene)


@pytest.mark.parametrize(("protocol", "largest"), [(1, ONE_WRITE), (2, MAX_DATA)])
def test_a_supervisor_of_the_protocol_before_is_spoken_to_in_frames_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, largest: int
) -> None:
    async def content() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(500_000)

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        monkeypatch.setattr(server, "PROTOCOL", protocol)
        await it.restart()
        assert (await it.handlers.put_file("box", "file", content())).size == 1_500_000
        assert (await it.handlers.execute("box", ExecRequest(command="wc -c < file"))).stdout.split() == ["1500000"]
        link = Link()
        await link.connect(it.processes.system, it.layout.instance_socket("box"))
        assert link.channel.mux.largest == largest
        link.channel.hang_up()

    play(tmp_path, scene)


def test_the_next_protocol_is_spoken_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        monkeypatch.setattr(server, "PROTOCOL", PROTOCOL + 1)
        await it.restart()
        assert (await it.handlers.execute("box", ExecRequest(command="echo here"))).stdout == "here\n"

    play(tmp_path, scene)


def test_a_request_of_a_newer_service_is_refused_and_the_connection_goes_on(tmp_path: Path) -> None:
    class Novel(Message, tag="novel"):
        """What a later version will think of."""

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box"))
        link = Link()
        link.channel.mux._requests = {**REQUESTS, Novel: Stopping}
        await link.connect(it.processes.system, it.layout.instance_socket("box"))
        with pytest.raises(Unsupported, match="novel"):
            await link.open(Novel()).result()
        assert type(await link.open(Jobs()).result()) is REQUESTS[Jobs]
        link.channel.hang_up()

    play(tmp_path, scene)


def test_a_supervisor_that_does_not_answer_can_be_stopped(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        it.fleet.leave_all()
        it.layout.instance_socket("box").unlink()
        lock = it.layout.session("box", persistent=True).claim
        it.start()
        await it.fleet.reconcile()
        info = await only(it)
        assert (info.status, info.pid) == ("Running", 0)  # its "process" is this one, which is not looked for
        assert "does not answer" in (info.reason or "")
        for call in (it.handlers.stop("box"), it.handlers.delete("box"), it.handlers.resume("box")):
            with pytest.raises(Unavailable):
                await call
        assert lock.exists()
        [child] = it.processes.children.values()
        it.processes.signal(child.pid, signal.SIGTERM)
        assert await it.fleet.get("box").ended(10)
        assert await status(it) == {"box": "Stopped"}

    play(tmp_path, scene)


def test_a_supervisor_that_hangs_up_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capsem.service.vm.EXIT_MARGIN", 0.2)

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        link = it.fleet.get("box").link
        assert link is not None
        link.channel.hang_up()
        while (await only(it)).reason is None:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="hung up"):
            await it.handlers.execute("box", ExecRequest(command="true"))
        monkeypatch.undo()
        await it.handlers.stop("box")
        assert await status(it) == {"box": "Stopped"}

    play(tmp_path, scene)


# -- the host was restarted


def rewritten(session: SessionDir, **changes: Any) -> None:
    session.record.write_text(json.dumps({**json.loads(session.record.read_text()), **changes}))


def test_after_a_restart_of_the_host(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        for name, persistent in (("box", True), ("gone", False)):
            await it.handlers.provision(ProvisionRequest(name=name, persistent=persistent))
        sessions = [it.layout.session("box", persistent=True), it.layout.session("gone", persistent=False)]
        running = [session.record.read_text() for session in sessions]
        await it.fleet.stop_all()
        sessions[1].path.mkdir()
        for session, text in zip(sessions, running, strict=True):
            session.record.write_text(text)
            rewritten(session, host_boot_id="of another boot")
        it.layout.ready_file("box").touch()
        it.start()
        await it.fleet.reconcile()
        info = await only(it)
        assert (info.id, info.status, info.reason, info.last_error) == ("box", "Stopped", "host restarted", None)
        assert not list(it.layout.sessions.iterdir())
        assert not it.layout.ready_file("box").exists()
        await it.handlers.resume("box")
        assert (await only(it)).reason is None

    play(tmp_path, scene)


# -- records that cannot be read

SPOILT = [b"", b"\0" * 4096, b"{", b'{"format": 99}', b"[]"]


@pytest.mark.parametrize("content", SPOILT)
def test_a_vm_with_a_spoilt_record_is_defunct_until_it_is_deleted(tmp_path: Path, content: bytes) -> None:
    async def scene(it: World) -> None:
        for name in ("box", "good"):
            await it.handlers.provision(ProvisionRequest(name=name, persistent=True))
            await it.handlers.stop(name)
        session = it.layout.session("box", persistent=True)
        session.record.write_bytes(content)
        await it.restart()
        assert await status(it) == {"box": "Defunct", "good": "Stopped"}
        info = await it.handlers.info("box")
        assert (info.persistent, info.pid, info.ram_mb, info.cpus) == (True, 0, None, None)
        assert str(session.record) in (info.last_error or "")
        for call in (
            it.handlers.resume("box"),
            it.handlers.fork("box", ForkRequest(name="child")),
            it.handlers.provision(ProvisionRequest(name="child", from_="box")),
        ):
            with pytest.raises(Corrupt):
                await call
        assert session.record.read_bytes() == content
        assert len(list(it.layout.layers.glob("*.qcow2"))) == 2  # nobody knows which of them is whose

        await it.handlers.delete("box")
        assert not session.path.exists()
        await it.restart()
        assert await status(it) == {"good": "Stopped"}
        assert len(list(it.layout.layers.glob("*.qcow2"))) == 1

    play(tmp_path, scene)


def test_purge_takes_spoilt_vms_too(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        for name, persistent in (("box", True), ("gone", False)):
            await it.handlers.provision(ProvisionRequest(name=name, persistent=persistent))
        await it.fleet.stop_all()
        gone = it.layout.session("gone", persistent=False)
        gone.path.mkdir()
        for session in (it.layout.session("box", persistent=True), gone):
            session.record.write_text("?")
        await it.restart()
        assert await status(it) == {"box": "Defunct", "gone": "Defunct"}
        assert json.loads(it.layout.registry.read_text())["vms"]["box"]["defunct"]
        assert (await it.handlers.purge(PurgeRequest())).ephemeral_purged == 1
        assert (await it.handlers.purge(PurgeRequest(all=True))).persistent_purged == 1
        assert await status(it) == {}

    play(tmp_path, scene)


def test_the_claim_of_a_vm_with_a_spoilt_record_is_respected(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        pid = (await only(it)).pid
        session = it.layout.session("box", persistent=True)
        session.record.write_text("?")
        await it.restart()
        info = await only(it)
        assert (info.status, info.pid) == ("Running", pid)
        await it.handlers.stop("box")  # its supervisor has the record in memory, and writes it
        assert await status(it) == {"box": "Stopped"}

        session.record.write_text("?")
        await it.restart()
        held = try_lock(session.claim)
        assert isinstance(held, Lock)
        with pytest.raises(Unavailable):
            await it.handlers.delete("box")
        assert await status(it) == {"box": "Defunct"}
        held.release()
        await it.handlers.delete("box")
        assert await status(it) == {}

    play(tmp_path, scene)


def test_a_record_that_is_another_vm_s(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        await it.handlers.stop("box")
        copy = it.layout.session("copy", persistent=True)
        copy.path.mkdir()
        copy.record.write_bytes(it.layout.session("box", persistent=True).record.read_bytes())
        await it.restart()
        assert await status(it) == {"box": "Stopped", "copy": "Defunct"}
        await it.handlers.delete("copy")
        await it.handlers.resume("box")

    play(tmp_path, scene)


# -- the service ends


def test_who_is_not_suspended_in_time_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "SUSPEND_LIMIT", 0.2)
    asked = []

    async def suspend(vm_id: str) -> None:
        asked.append(vm_id)
        if vm_id == "slow":
            await asyncio.Event().wait()
        raise Unavailable("not this one")

    async def scene(it: World) -> None:
        for name, persistent in (("slow", True), ("odd", True), ("gone", False)):
            await it.handlers.provision(ProvisionRequest(name=name, persistent=persistent))
        await it.fleet.stop_all(suspend)
        assert sorted(asked) == ["odd", "slow"]
        assert await status(it) == {"slow": "Stopped", "odd": "Stopped"}

    play(tmp_path, scene)
