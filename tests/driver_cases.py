"""The contract that every hypervisor driver keeps (capsem.hypervisor.driver), case by case.

A rig is one driver with a guest that can count: each `ask` is answered with the next number, which the guest has in its
memory. `CASES` are run against the simulated driver in tests/contract and against QEMU in tests/vm.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from capsem.hypervisor.driver import Driver, Layer, Machine, MachineSpec, Saved, SaveFiles
from capsem.model.errors import CapsemError, Corrupt, MachineFailed
from capsem.store.locks import is_locked, try_lock
from capsem.store.ram import RamFile, RamIdentity, RamWriter, verify

ID = "0123456789abcdef0123456789abcdef"
OTHER_ID = "fedcba9876543210fedcba9876543210"
LIMIT = 60.0  # seconds; a hung case is worse than a slow one


class Peer(Protocol):
    """The guest of one machine, from outside."""

    async def ready(self) -> None:
        """Return when it can be asked."""

    async def ask(self) -> int:
        """The next number."""

    async def power_off(self) -> None:
        """Have the guest switch its machine off."""

    async def is_silent(self) -> bool:
        """Whether it says nothing unasked."""

    def close(self) -> None:
        """Close the channels, which are ours."""


class Rig(Protocol):
    """A driver and what it takes to run a machine."""

    root: Path
    driver: Driver

    def spec(self, **changes: Any) -> MachineSpec:
        """A small machine on base.img and top.qcow2."""

    def layer(self, name: str) -> Layer:
        """A layer of this name, made when it is not there."""

    def peer(self, machine: Machine, source: Peer | None = None) -> Awaitable[Peer]:
        """Speak with a machine's guest; `source`: with whose guest it was saved."""


Case = Callable[[Rig], Awaitable[None]]
CASES: list[Case] = []


def case(function: Case) -> Case:
    CASES.append(function)
    return function


# -- what cases are made of


@asynccontextmanager
async def started(rig: Rig, spec: MachineSpec | None = None) -> AsyncIterator[tuple[Machine, Peer]]:
    """A machine whose vCPUs have not run; killed at the end."""
    with open(os.devnull, "rb") as null:
        machine = await rig.driver.start(spec or rig.spec(), vmm_lock=null.fileno())
    peer = await rig.peer(machine)
    try:
        yield machine, peer
    finally:
        await machine.kill()
        peer.close()


@asynccontextmanager
async def restored(rig: Rig, files: Files, source: Peer, name: str) -> AsyncIterator[Peer]:
    """A machine that goes on from a save, on a layer of its own, running; killed at the end."""
    volume = (*files.volume, rig.layer(name))
    spec = rig.spec(ram_file=files.ram, volume=volume)
    with open(os.devnull, "rb") as null:
        machine = await rig.driver.restore(spec, files.devices, vmm_lock=null.fileno())
    peer = await rig.peer(machine, source)
    try:
        await machine.run()
        yield peer
    finally:
        await machine.kill()
        peer.close()


class Files:
    """Where one save goes, and the volume that it froze."""

    def __init__(self, rig: Rig, name: str, volume: tuple[Layer, ...]) -> None:
        root = rig.root / name
        root.mkdir()
        self.size = rig.spec().ram_mb << 20
        self.ram, self.sums, self.devices = root / "ram", root / "sums", root / "devices"
        self.writer = RamWriter(self.ram, self.sums, self.size)
        self.volume = volume

    async def save(
        self, rig: Rig, machine: Machine, layer: str, *, go_on: bool, compare: bool = False, **calls: Any
    ) -> Saved:
        files = SaveFiles(self.devices, self.writer, compare=compare)
        saved = await machine.save(files, rig.layer(layer), go_on=go_on, **calls)
        digest = self.writer.finish(RamIdentity("box", ID, self.size))
        self.writer.close()
        verify(self.ram, self.sums, self.size, digest)
        return saved

    def digests(self) -> list[bytes]:
        paths = (self.ram, self.devices, *(layer.path for layer in self.volume))
        return [hashlib.sha256(path.read_bytes()).digest() for path in paths]


# -- start, run, pause


@case
async def a_machine_begins_stopped_and_runs_when_told(rig: Rig) -> None:
    async with started(rig) as (machine, peer):
        assert machine.pid > 0
        assert machine.version == await rig.driver.version()
        assert machine.top_layer == rig.spec().volume[-1]
        assert await peer.is_silent()
        await machine.run()
        await peer.ready()
        assert [await peer.ask(), await peer.ask()] == [1, 2]


@case
async def pause_and_run_take_turns_and_repeat(rig: Rig) -> None:
    async with started(rig) as (machine, peer):
        await machine.run()
        await peer.ready()
        for number in range(1, 4):
            await machine.pause()
            await machine.pause()
            answer = asyncio.ensure_future(peer.ask())
            assert await peer.is_silent()
            assert not answer.done()
            await machine.run()
            await machine.run()
            assert await answer == number


@case
async def two_boots_may_overlap_whatever_the_features(rig: Rig) -> None:
    specs = [rig.spec(volume=(*rig.spec().volume[:1], rig.layer(f"{name}.qcow2"))) for name in "ab"]

    async def boot(spec: MachineSpec) -> int:
        async with started(rig, spec) as (machine, peer):
            await machine.run()
            await peer.ready()
            return await peer.ask()

    assert await asyncio.gather(*map(boot, specs)) == [1, 1]


# -- the end


@case
async def kill_is_final_at_any_time_and_any_number_of_times(rig: Rig) -> None:
    for runs in (False, True):
        async with started(rig) as (machine, peer):
            if runs:
                await machine.run()
                await peer.ready()
            waiting = asyncio.ensure_future(machine.wait())
            await asyncio.gather(machine.kill(), machine.kill())
            await machine.kill()
            ending = await machine.wait()
            assert not ending.clean
            assert ending.reason
            assert await waiting == ending == await machine.wait()
            for call in (machine.run, machine.pause):
                with pytest.raises(MachineFailed):
                    await call()


@case
async def a_guest_that_powers_off_ends_its_machine_cleanly(rig: Rig) -> None:
    async with started(rig) as (machine, peer):
        await machine.run()
        await peer.ready()
        await peer.power_off()
        ending = await machine.wait()
        assert ending.clean
        await machine.kill()
        assert await machine.wait() == ending


@case
async def the_lock_lives_exactly_as_long_as_the_machine(rig: Rig) -> None:
    path = rig.root / "vmm.lock"
    lock = try_lock(path)
    assert lock is not None
    machine = await rig.driver.start(rig.spec(), vmm_lock=lock.fd)
    lock.release()
    peer = await rig.peer(machine)
    assert is_locked(path)
    await machine.kill()
    assert not is_locked(path)
    peer.close()


# -- layers


@case
async def a_layer_is_private_and_never_written_over(rig: Rig) -> None:
    path = rig.root / "new.qcow2"
    rig.driver.create_layer(path, size_mb=16, vm_id="box", layer_id=ID)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        rig.driver.create_layer(path, size_mb=16, vm_id="box", layer_id=OTHER_ID)
    assert path.read_bytes() == before


@case
async def a_machine_goes_on_in_another_layer(rig: Rig) -> None:
    async with started(rig) as (machine, peer):
        await machine.run()
        await peer.ready()
        top = machine.top_layer
        layer = rig.layer("second.qcow2")
        await machine.add_layer(layer)
        assert machine.top_layer == layer
        frozen = top.path.read_bytes()
        assert await peer.ask() == 1
        missing = Layer(rig.root / "missing.qcow2", "qcow2")
        with pytest.raises(CapsemError):
            await machine.add_layer(missing)
        assert machine.top_layer == layer
        assert await peer.ask() == 2
        assert top.path.read_bytes() == frozen


@case
async def merged_layers_stand_for_their_sources(rig: Rig) -> None:
    sources = [rig.layer(f"{name}.qcow2").path for name in "ab"]
    before = [path.read_bytes() for path in sources]
    target = rig.root / "merged.qcow2"
    await rig.driver.merge_layers(sources, target, vm_id="box", layer_id=OTHER_ID, size_mb=16)
    assert target.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        await rig.driver.merge_layers(sources, target, vm_id="box", layer_id=OTHER_ID)
    assert [path.read_bytes() for path in sources] == before
    spec = rig.spec(volume=(rig.spec().volume[0], Layer(target, "qcow2"), rig.layer("c.qcow2")))
    async with started(rig, spec) as (machine, peer):
        await machine.run()
        await peer.ready()
        assert await peer.ask() == 1


@case
async def what_is_no_layer_is_not_merged_and_leaves_nothing(rig: Rig) -> None:
    for wrong in (b"", b"nothing of ours", bytes(8192)):
        (rig.root / "wrong.qcow2").write_bytes(wrong)
        target = rig.root / "merged.qcow2"
        with pytest.raises(Corrupt):
            await rig.driver.merge_layers(
                [rig.layer("a.qcow2").path, rig.root / "wrong.qcow2"], target, vm_id="box", layer_id=ID
            )
        assert not target.exists()
    with pytest.raises(Corrupt):
        await rig.driver.merge_layers([rig.layer("a.qcow2").path], target, vm_id="box", layer_id=ID, size_mb=17)
    assert not target.exists()


# -- save and restore


@case
async def a_live_save_goes_on_and_forks_go_on_from_it(rig: Rig) -> None:
    async with started(rig) as (machine, peer):
        await machine.run()
        await peer.ready()
        assert await peer.ask() == 1
        files = Files(rig, "first", rig.spec().volume)
        order: list[str] = []

        async def hold() -> None:
            order.append("hold")

        saved = await files.save(
            rig,
            machine,
            "second.qcow2",
            go_on=True,
            hold=hold,
            instant=lambda: order.append("instant"),
            release=lambda: order.append("release"),
        )
        assert order == ["hold", "instant", "release"]
        assert saved.written > 0
        assert saved.pause >= 0
        assert machine.top_layer == rig.layer("second.qcow2")
        before = files.digests()
        assert await peer.ask() == 2
        again = Files(rig, "again", (*rig.spec().volume, rig.layer("second.qcow2")))
        assert again.writer.copy(RamFile(files.ram, files.sums))
        await again.save(rig, machine, "third.qcow2", go_on=True, compare=True)
        assert await peer.ask() == 3
    for fork in range(2):
        async with restored(rig, files, peer, f"fork{fork}.qcow2") as other:
            assert await other.ask() == 2
    async with restored(rig, again, peer, "fork-again.qcow2") as other:
        assert await other.ask() == 3
    assert files.digests() == before


@case
async def a_last_save_leaves_the_machine_paused(rig: Rig) -> None:
    async with started(rig) as (machine, peer):
        await machine.run()
        await peer.ready()
        assert await peer.ask() == 1
        files, called = Files(rig, "first", rig.spec().volume), []
        await files.save(
            rig,
            machine,
            "second.qcow2",
            go_on=False,
            instant=lambda: called.append(1),
            release=lambda: called.append(2),
        )
        assert called == [1]
        assert await peer.is_silent()
    before = files.digests()
    for _ in range(2):  # the second after the first has come to nothing, as after a resume that failed
        async with restored(rig, files, peer, f"resumed{len(called)}.qcow2") as other:
            assert await other.ask() == 2
        called.append(3)
    assert files.digests() == before


@case
async def a_save_that_fails_costs_nothing(rig: Rig) -> None:
    class Full:
        """A RAM file on a disk without room."""

        def patch(self, *_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for go_on in (True, False):
        name = f"go-on-{go_on}"
        async with started(rig, rig.spec(volume=(rig.spec().volume[0], rig.layer(f"{name}.qcow2")))) as (machine, peer):
            await machine.run()
            await peer.ready()
            failing = Files(rig, f"{name}-full", ())
            second = rig.layer(f"{name}-second.qcow2")
            with pytest.raises((OSError, MachineFailed)):
                await machine.save(SaveFiles(failing.devices, Full(), compare=False), second, go_on=go_on)  # type: ignore[arg-type]
            assert machine.top_layer in (second, rig.layer(f"{name}.qcow2"))
            await machine.run()
            assert await peer.ask() == 1
            volume = (rig.spec().volume[0], rig.layer(f"{name}.qcow2"))
            if machine.top_layer == second:
                volume = (*volume, second)
            files = Files(rig, name, volume)
            await files.save(rig, machine, f"{name}-third.qcow2", go_on=False)
        async with restored(rig, files, peer, f"{name}-resumed.qcow2") as other:
            assert await other.ask() == 2


@case
async def what_is_no_device_state_is_refused_and_leaves_nothing(rig: Rig) -> None:
    path = rig.root / "vmm.lock"
    for number, wrong in enumerate((b"", b"nothing of ours", os.urandom(4096))):
        devices = rig.root / f"wrong{number}"
        devices.write_bytes(wrong)
        lock = try_lock(path)
        assert lock is not None
        with pytest.raises(CapsemError):
            await rig.driver.restore(rig.spec(), devices, vmm_lock=lock.fd)
        lock.release()
        assert not is_locked(path)


@case
async def saves_and_restores_of_different_machines_overlap_as_the_features_say(rig: Rig) -> None:
    """Side by side where they may; one after the other everywhere."""
    bases = [(rig.spec().volume[0], rig.layer(f"{name}.qcow2")) for name in "ab"]
    together = rig.driver.features.transitions_overlap
    async with started(rig, rig.spec(volume=bases[0])) as one, started(rig, rig.spec(volume=bases[1])) as other:
        saves = []
        for number, (machine, peer) in enumerate((one, other)):
            await machine.run()
            await peer.ready()
            assert await peer.ask() == 1
            files = Files(rig, f"save{number}", bases[number])
            saves.append((files, peer, files.save(rig, machine, f"next{number}.qcow2", go_on=True)))
        await _all([save for _, _, save in saves], together=together)

    async def back(number: int, files: Files, peer: Peer) -> None:
        async with restored(rig, files, peer, f"back{number}.qcow2") as restored_peer:
            assert await restored_peer.ask() == 2

    await _all([back(number, files, peer) for number, (files, peer, _) in enumerate(saves)], together=together)


async def _all(calls: list[Any], *, together: bool) -> None:
    if together:
        await asyncio.gather(*calls)
    else:
        for call in calls:
            await call


# -- the description


@case
async def what_must_be_equal_to_restore_is_told(rig: Rig) -> None:
    accelerator, version = await rig.driver.accelerator(), await rig.driver.version()
    shape = {"hardware": 1, "accelerator": accelerator, "cpus": 1, "ram_mb": 64, "command_line": "quiet"}
    told = rig.driver.fingerprint(version, **shape)  # type: ignore[arg-type]
    assert told == rig.driver.fingerprint(version, **shape)  # type: ignore[arg-type]
    for change in ({"cpus": 2}, {"ram_mb": 128}, {"command_line": "loud"}):
        assert rig.driver.fingerprint(version, **{**shape, **change}) != told  # type: ignore[arg-type]
    assert rig.driver.fingerprint("another 1", **shape) != told  # type: ignore[arg-type]
