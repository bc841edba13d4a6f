"""The service's operations on a real fleet, real supervisors (as tasks) and the real agent (as processes)."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from capsem.api.exec_types import ExecRequest, RunRequest
from capsem.api.file_types import ReadFileRequest, WriteFileRequest
from capsem.api.vm_types import ForkRequest, PersistRequest, ProvisionRequest, PurgeRequest, PurgeResponse
from capsem.control import heartbeat
from capsem.image.catalog import Catalog
from capsem.model.errors import (
    AlreadyExists,
    CapsemError,
    InvalidInput,
    LimitReached,
    MachineFailed,
    NotFound,
    NotRunning,
    TimedOut,
)
from capsem.service.link import Link
from capsem.store import records
from capsem.store.locks import is_locked
from capsem.supervisor import room
from service_world import World, play, status


def test_create_exec_stop_resume_delete(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        made = await it.handlers.provision(ProvisionRequest(name="box", persistent=True, env={"FOO": "bar"}))
        assert made.id == "box"
        assert Path(made.uds_path).is_socket()
        assert it.layout.ready_file("box").exists()
        answer = await it.handlers.execute("box", ExecRequest(command="echo $FOO; echo oops >&2; exit 3"))
        assert (answer.stdout, answer.stderr, answer.exit_code) == ("bar\n", "oops\n", 3)
        await it.handlers.write_file("box", WriteFileRequest(path="a/b.txt", content="hello"))
        info = await it.handlers.info("box")
        assert (info.status, info.persistent, info.name) == ("Running", True, "box")
        assert info.pid > 0

        stopped = await it.handlers.stop("box")
        assert stopped.persistent
        assert not Path(made.uds_path).exists()
        assert not it.layout.ready_file("box").exists()
        info = await it.handlers.info("box")
        assert (info.status, info.pid) == ("Stopped", 0)
        assert info.size_bytes
        with pytest.raises(NotRunning):
            await it.handlers.execute("box", ExecRequest(command="true"))
        with pytest.raises(NotRunning):
            await it.handlers.stop("box")

        assert (await it.handlers.resume("box")).id == "box"
        assert (await it.handlers.resume("box")).id == "box"
        assert (
            await it.handlers.read_file("box", ReadFileRequest(path="/root/a/b.txt".replace("/root/", "")))
        ).content == "hello"
        assert (await it.handlers.execute("box", ExecRequest(command="echo $FOO"))).stdout == "bar\n"

        await it.handlers.delete("box")
        assert await status(it) == {}
        for call in (it.handlers.delete("box"), it.handlers.info("box"), it.handlers.resume("box")):
            with pytest.raises(NotFound):
                await call
        assert not list(it.layout.persistent.iterdir())
        await it.fleet.cleared()
        assert not list(it.layout.layers.glob("*.qcow2"))

    play(tmp_path, scene)


def test_a_delete_waits_for_the_disk_for_what_has_to_be_gone_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        synced.clear()
        await it.handlers.stop("box")
        assert sum("vm.json" in name for name in synced) == 2  # that it stops, that it has stopped
        await it.handlers.resume("box")
        synced.clear()
        await it.handlers.delete("box")
        assert not [name for name in synced if "vm.json" in name]
        assert "box" in synced  # the record's removal
        assert await status(it) == {}

    play(tmp_path, scene)


def test_an_ephemeral_vm_is_gone_when_it_stops(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        made = await it.handlers.provision(ProvisionRequest())
        assert made.id.endswith("-tmp")
        assert not (await it.handlers.stop(made.id)).persistent
        assert await status(it) == {}
        assert not list(it.layout.sessions.iterdir())

    play(tmp_path, scene)


def test_run_is_a_vm_for_one_command(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        answer = await it.handlers.run(RunRequest(command="echo $((6*7)); exit 3", env={"A": "b"}))
        assert (answer.stdout, answer.exit_code) == ("42\n", 3)
        assert await status(it) == {}
        with pytest.raises(TimedOut, match=r"timed out after 0\.2s"):
            await it.handlers.run(RunRequest(command="sleep 9", timeout_secs=0.2))
        assert await status(it) == {}

    play(tmp_path, scene)


def test_a_profile_without_an_image_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        for request in (ProvisionRequest(name="box", profile="code"), ProvisionRequest(profile="code")):
            with pytest.raises(NotFound, match="no image code"):
                await it.handlers.provision(request)
        with pytest.raises(NotFound, match="no image code"):
            await it.handlers.run(RunRequest(command="true", profile="code"))
        assert await status(it) == {}
        assert not list(it.layout.layers.iterdir())
        await it.handlers.provision(ProvisionRequest(name="box", profile="default"))
        assert await status(it) == {"box": "Running"}

    play(tmp_path, scene)


def test_list_tells_whether_the_default_image_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: World) -> None:
        health = (await it.handlers.list()).asset_health
        assert (health.ready, health.version, health.missing) == (True, "d" * 12, [])
        monkeypatch.setattr(it.catalog, "find", Catalog([tmp_path], tmp_path).find)  # where there is none
        health = (await it.handlers.list()).asset_health
        assert (health.ready, health.version, health.missing) == (False, "", ["default image"])

    play(tmp_path, scene)


def test_vms_whose_volume_has_to_be_formatted_first_are_made_at_the_same_time(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        requests = [ProvisionRequest(name=f"box-{number}", disk_mb=512) for number in range(3)]
        made = await asyncio.gather(*map(it.handlers.provision, requests))
        assert [each.id for each in made] == ["box-0", "box-1", "box-2"]
        assert [path.name for path in it.layout.volumes.iterdir()] == ["512.raw"]

    play(tmp_path, scene)


def test_names_are_taken_once(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        results = await asyncio.gather(
            *(it.handlers.provision(ProvisionRequest(name="box", persistent=True)) for _ in range(3)),
            return_exceptions=True,
        )
        assert sum(isinstance(result, AlreadyExists) for result in results) == 2
        await it.handlers.stop("box")
        with pytest.raises(AlreadyExists, match="already exists"):
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True))

    play(tmp_path, scene)


def test_a_name_that_is_nearly_one_is_told(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        for name in ("web", "builder"):
            await it.handlers.provision(ProvisionRequest(name=name))
        for asked, said in (("bulider", "did you mean builder? "), ("elsewhere", ""), ("b" * 100_000, "")):
            with pytest.raises(NotFound) as told:
                await it.handlers.info(asked)
            assert told.value.hint == f"{said}capsem list shows those there are"

    play(tmp_path, scene)


def test_no_more_run_than_may(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        for _ in range(2):
            await it.handlers.provision(ProvisionRequest())
        with pytest.raises(LimitReached, match="maximum is 2"):
            await it.handlers.provision(ProvisionRequest())
        await it.handlers.delete((await it.handlers.list()).sandboxes[0].id)
        await it.handlers.provision(ProvisionRequest())

    play(tmp_path, scene, limit=2)


@pytest.mark.parametrize("cpus_ram", [(0, 512), (99, 512), (1, 0), (1, 999999)])
def test_limits_are_refused_and_leave_nothing(tmp_path: Path, cpus_ram: tuple[int, int]) -> None:
    async def scene(it: World) -> None:
        with pytest.raises(InvalidInput):
            await it.handlers.provision(
                ProvisionRequest(name="box", persistent=True, cpus=cpus_ram[0], ram_mb=cpus_ram[1])
            )
        assert not list(it.layout.persistent.iterdir())
        assert not list(it.layout.layers.iterdir())

    play(tmp_path, scene)


def test_a_machine_that_does_not_start(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        it.driver.fail_start = MachineFailed("no such luck")
        with pytest.raises(CapsemError, match="did not start"):
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        assert await status(it) == {"box": "Defunct"}
        info = await it.handlers.info("box")
        assert info.last_error
        assert "no such luck" in info.last_error
        with pytest.raises(CapsemError, match="did not start"):
            await it.handlers.provision(ProvisionRequest(name="gone"))
        assert await status(it) == {"box": "Defunct"}
        assert [path.name.startswith("gone-failed-") for path in it.layout.sessions.iterdir()] == [True]
        assert (await it.handlers.logs("gone")).process_logs is not None
        it.driver.fail_start = None
        await it.handlers.resume("box")
        assert await status(it) == {"box": "Running"}

    play(tmp_path, scene)


def test_a_vm_can_be_resumed_as_soon_as_it_is_said_to_have_failed(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        vm, process = it.fleet.get("box"), it.driver.machines[0]._process
        assert process is not None
        process.kill()
        while not vm.ending:
            assert vm.running
            await asyncio.sleep(0)
        assert vm.running  # its supervisor has still to go
        await it.handlers.resume("box")
        assert await status(it) == {"box": "Running"}
        assert len(it.driver.machines) == 2

    play(tmp_path, scene)


def test_a_vm_can_be_resumed_before_it_is_known_that_its_machine_has_died(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        vm, process = it.fleet.get("box"), it.driver.machines[0]._process
        assert process is not None
        process.kill()
        while is_locked(vm.session.vmm_lock):
            time.sleep(0.001)  # nobody gets to hear of it meanwhile: all of them live on this loop
        assert vm.running
        assert not vm.ending
        await it.handlers.resume("box")
        assert len(it.driver.machines) == 2
        assert await status(it) == {"box": "Running"}
        assert (await it.handlers.execute("box", ExecRequest(command="echo here"))).stdout == "here\n"

    play(tmp_path, scene)


def test_who_waits_for_a_vm_that_somebody_stops_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did not fail: nothing is wrong with it, and it can be started again."""

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        await it.handlers.stop("box")
        start, begun, go = it.driver.start, asyncio.Event(), asyncio.Event()

        async def start_later(*arguments: Any, **options: Any) -> Any:
            begun.set()
            await go.wait()
            return await start(*arguments, **options)

        monkeypatch.setattr(it.driver, "start", start_later)
        resuming = asyncio.create_task(it.handlers.resume("box"))
        await begun.wait()
        while not it.fleet.get("box").running:
            await asyncio.sleep(0.01)
        running = asyncio.create_task(it.handlers.execute("box", ExecRequest(command="true")))
        stopping = asyncio.create_task(it.handlers.stop("box"))
        await asyncio.sleep(0.1)  # all of them wait
        go.set()
        await stopping
        for waiting in (resuming, running):
            with pytest.raises(NotRunning, match="was stopped"):
                await waiting
        assert await status(it) == {"box": "Stopped"}

    play(tmp_path, scene)


def test_a_machine_that_dies_is_defunct_and_comes_back(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        await it.handlers.write_file("box", WriteFileRequest(path="kept", content="yes"))
        machine = it.driver.machines[0]
        assert machine._process is not None
        running = asyncio.create_task(it.handlers.execute("box", ExecRequest(command="sleep 60")))
        await asyncio.sleep(0.1)
        machine._process.kill()
        with pytest.raises(CapsemError):
            await running
        assert await it.fleet.get("box").ended(5)
        assert await status(it) == {"box": "Defunct"}
        await it.handlers.resume("box")
        assert (await it.handlers.read_file("box", ReadFileRequest(path="kept"))).content == "yes"

    play(tmp_path, scene)


def test_a_guest_that_is_silent_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD", 0.05)
    monkeypatch.setattr(heartbeat, "SILENCE", 0.2)

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box"))
        machine = it.driver.machines[0]
        await machine.pause()
        while (info := await it.handlers.info("box")).reason is None:
            await asyncio.sleep(0.01)
        assert "has not answered" in info.reason
        assert info.status == "Running"
        await machine.run()
        while (await it.handlers.info("box")).reason is not None:
            await asyncio.sleep(0.01)

    play(tmp_path, scene)


def test_a_machine_without_room_on_the_disk_goes_on_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = iter((False, True))
    monkeypatch.setattr(room, "TURN", 0.1)
    monkeypatch.setattr(room, "has_room", lambda _store: next(rooms))

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box"))
        assert (await it.handlers.info("box")).warning is None
        it.driver.machines[0].full.set()
        seen = []
        while not seen or seen[-1] is not None:
            await asyncio.sleep(0.01)
            warning = (await it.handlers.info("box")).warning
            assert (await it.handlers.logs("box")).warning == warning
            if warning is not None or seen:
                seen.append(warning)
        assert "disk is full" in seen[0]
        assert (await it.handlers.execute("box", ExecRequest(command="echo on"))).stdout == "on\n"

    play(tmp_path, scene)


def test_a_guest_that_finds_no_room_to_boot_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only that it was not ready in time."""
    monkeypatch.setattr(room, "has_room", lambda _store: False)

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box"))
        it.driver.machines[0].full.set()
        while (await it.handlers.info("box")).warning is None:
            await asyncio.sleep(0)

        async def never(_link: Link, _limit: float) -> bool:
            return False

        monkeypatch.setattr(Link, "wait_ready", never)
        with pytest.raises(TimedOut, match="disk is full") as caught:
            await it.handlers.execute("box", ExecRequest(command="true"))
        assert "capsem df" in str(caught.value.hint)

    play(tmp_path, scene)


def test_a_new_service_adopts_what_runs(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        ephemeral = (await it.handlers.provision(ProvisionRequest())).id
        pids = {info.id: info.pid for info in (await it.handlers.list()).sandboxes}
        await it.restart()
        assert await status(it) == {"box": "Running", ephemeral: "Running"}
        assert (await it.handlers.execute("box", ExecRequest(command="echo here"))).stdout == "here\n"
        assert pids.keys() == {"box", ephemeral}
        await it.handlers.delete(ephemeral)
        assert await status(it) == {"box": "Running"}

    play(tmp_path, scene)


def test_the_longest_variable_that_linux_takes(tmp_path: Path) -> None:
    """The kernel has a limit for each string that it hands to a program: what is just within it arrives, the next is refused."""
    longest = "x" * (128 * 1024 - len("A=\0"))

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", env={"A": longest}))
        for env in (None, {"A": longest}):
            told = await it.handlers.execute("box", ExecRequest(command='echo "${#A}"', env=env))
            assert (told.exit_code, told.stdout) == (0, f"{len(longest)}\n")
        with pytest.raises(InvalidInput, match="variable A is too long"):
            await it.handlers.execute("box", ExecRequest(command="true", env={"A": longest + "x"}))
        with pytest.raises(InvalidInput, match="variable A is too long"):
            await it.handlers.provision(ProvisionRequest(name="other", env={"A": longest + "x"}))
        assert await status(it) == {"box": "Running"}

    play(tmp_path, scene)


def test_many_commands_do_not_mix(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box"))
        commands = [f"for i in $(seq 200); do echo {n}; echo e{n} >&2; done; exit {n}" for n in range(12)]
        answers = await asyncio.gather(
            *(it.handlers.execute("box", ExecRequest(command=command)) for command in commands)
        )
        for n, answer in enumerate(answers):
            assert (answer.stdout, answer.stderr, answer.exit_code) == (f"{n}\n" * 200, f"e{n}\n" * 200, n)

    play(tmp_path, scene)


def test_output_is_capped_and_says_so(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box"))
        answer = await it.handlers.execute("box", ExecRequest(command="head -c 30000000 /dev/zero | tr '\\0' x"))
        assert len(answer.stdout) == 10 * 1024 * 1024
        assert answer.truncated
        assert answer.exit_code == 0

    play(tmp_path, scene)


def test_a_caller_who_goes_away_ends_the_command(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box"))
        call = asyncio.create_task(it.handlers.execute("box", ExecRequest(command="echo $$ > pid; exec sleep 600")))
        while (await it.handlers.execute("box", ExecRequest(command="cat pid"))).exit_code:
            pass
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        check = "for i in $(seq 100); do kill -0 $(cat pid) 2>/dev/null || exit 0; sleep 0.05; done; exit 1"
        assert (await it.handlers.execute("box", ExecRequest(command=check))).exit_code == 0

    play(tmp_path, scene)


def test_persist_moves_a_running_vm(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        old = (await it.handlers.provision(ProvisionRequest())).id
        await it.handlers.write_file(old, WriteFileRequest(path="kept", content="yes"))
        call = asyncio.create_task(
            it.handlers.execute(old, ExecRequest(command="sleep 0.5; echo done; echo $CAPSEM_VM_NAME"))
        )
        pid = (await it.handlers.info(old)).pid
        await it.handlers.persist(old, PersistRequest(name="kept-box"))
        with pytest.raises(NotFound):
            await it.handlers.info(old)
        info = await it.handlers.info("kept-box")
        assert (info.persistent, info.name, info.pid, info.status) == (True, "kept-box", pid, "Running")
        assert (await call).stdout == f"done\n{old}\n"
        assert (
            await it.handlers.execute("kept-box", ExecRequest(command="cat kept; echo $CAPSEM_VM_NAME"))
        ).stdout == "yeskept-box\n"
        assert not list(it.layout.sessions.iterdir())
        assert it.layout.ready_file("kept-box").exists()
        with pytest.raises(InvalidInput):
            await it.handlers.persist("kept-box", PersistRequest(name="again"))
        await it.handlers.stop("kept-box")
        await it.handlers.resume("kept-box")
        assert (await it.handlers.read_file("kept-box", ReadFileRequest(path="kept"))).content == "yes"
        other = (await it.handlers.provision(ProvisionRequest())).id
        with pytest.raises(AlreadyExists):
            await it.handlers.persist(other, PersistRequest(name="kept-box"))
        with pytest.raises(InvalidInput):
            await it.handlers.persist(other, PersistRequest(name="../x"))
        assert (await it.handlers.info(other)).status == "Running"

    play(tmp_path, scene)


def test_a_name_whose_socket_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run directory where some names leave room for a socket beside it, and longer ones do not."""

    async def scene(it: World) -> None:
        old = (await it.handlers.provision(ProvisionRequest())).id
        monkeypatch.setattr("capsem.store.layout.SOCKET_PATH_LIMIT", len(str(it.layout.instance_socket(old))))
        name = f"longer-than-{old}"
        await it.handlers.persist(old, PersistRequest(name=name))
        assert it.layout.instance_socket(name).parent.parent.name == "other"
        await it.restart()
        assert await status(it) == {name: "Running"}
        await it.handlers.delete(name)
        assert not it.layout.instance_socket(name).exists()

    with tempfile.TemporaryDirectory(prefix="capsem-") as short:
        monkeypatch.setattr(tempfile, "tempdir", f"{short}/other")
        Path(short, "other").mkdir()
        play(Path(short), scene)


def test_a_vm_keeps_its_name_where_the_new_ones_socket_cannot_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: World) -> None:
        old = (await it.handlers.provision(ProvisionRequest())).id
        monkeypatch.setattr("capsem.store.layout.SOCKET_PATH_LIMIT", 0)
        monkeypatch.setattr(tempfile, "tempdir", str(far))
        for _ in range(2):
            with pytest.raises(MachineFailed, match="path too long"):
                await it.handlers.persist(old, PersistRequest(name="box"))
            assert records.read(it.fleet.get(old).session).id == old
        monkeypatch.undo()
        assert await status(it) == {old: "Running"}
        await it.handlers.persist(old, PersistRequest(name="box"))
        assert await status(it) == {"box": "Running"}

    far = tmp_path / ("far" * 30)
    far.mkdir()
    play(tmp_path, scene)


def test_purge_takes_the_ephemeral_or_all(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="kept", persistent=True))
        await it.handlers.provision(ProvisionRequest(name="also-kept", persistent=True))
        await it.handlers.stop("also-kept")
        for _ in range(3):
            await it.handlers.provision(ProvisionRequest())
        assert await it.handlers.purge(PurgeRequest()) == PurgeResponse(
            purged=3, persistent_purged=0, ephemeral_purged=3
        )
        assert (await status(it)).keys() == {"kept", "also-kept"}
        assert (await it.handlers.purge(PurgeRequest(all=True))).persistent_purged == 2
        assert await status(it) == {}
        await it.fleet.cleared()
        assert not list(it.layout.layers.glob("*.qcow2"))

    play(tmp_path, scene)


@pytest.mark.parametrize("running", [True, False])
def test_fork_shares_layers_and_goes_its_own_way(tmp_path: Path, running: bool) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True, env={"SECRET": "x"}))
        if not running:
            await it.handlers.stop("box")
        before = it.fleet.get("box").record.layers
        assert (await it.handlers.fork("box", ForkRequest(name="child", description="a copy"))).size_bytes > 0
        source, child = it.fleet.get("box").record, it.fleet.get("child").record
        assert source.layers[:-1] == child.layers[:-1] == before
        assert source.layers[-1] != child.layers[-1]
        assert (child.forked_from, child.description, dict(child.spec.env)) == ("box", "a copy", {})
        info = await it.handlers.info("child")
        assert (info.status, info.forked_from, info.description) == ("Stopped", "box", "a copy")
        with pytest.raises(AlreadyExists):
            await it.handlers.fork("box", ForkRequest(name="child"))
        with pytest.raises(NotFound):
            await it.handlers.fork("nobody", ForkRequest(name="other"))
        with pytest.raises(InvalidInput):
            await it.handlers.fork("box", ForkRequest(name="-bad"))
        # The parent may go; the child keeps what it stands on.
        await it.handlers.delete("box")
        assert all(it.layout.layer(layer).exists() for layer in child.layers)
        await it.handlers.resume("child")
        await it.handlers.delete("child")
        await it.fleet.cleared()
        assert not list(it.layout.layers.glob("*.qcow2"))

    play(tmp_path, scene)


def test_create_from_a_persistent_vm(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        made = await it.handlers.provision(
            ProvisionRequest(name="copy", persistent=True, from_="box", cpus=1, env={"A": "b"})
        )
        assert made.id == "copy"
        record = it.fleet.get("copy").record
        assert (record.forked_from, record.spec.cpus, dict(record.spec.env)) == ("box", 1, {"A": "b"})
        assert (await it.handlers.execute("copy", ExecRequest(command="echo $A"))).stdout == "b\n"
        with pytest.raises(NotFound):
            await it.handlers.provision(ProvisionRequest(name="more", from_="nobody"))
        temporary = (await it.handlers.provision(ProvisionRequest())).id
        with pytest.raises(InvalidInput):
            await it.handlers.provision(ProvisionRequest(name="more", from_=temporary))
        assert (await status(it)).keys() == {"box", "copy", temporary}

    play(tmp_path, scene)


def test_a_delete_that_waited_leaves_a_vm_alone_that_has_another_name_by_then(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="old"))
        keeping = asyncio.create_task(it.handlers.persist("old", PersistRequest(name="new")))
        await asyncio.sleep(0)  # it has the turn
        with pytest.raises(NotFound):
            await it.handlers.delete("old")
        await keeping
        assert await status(it) == {"new": "Running"}

    play(tmp_path, scene)
