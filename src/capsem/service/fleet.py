"""All VMs of a service, from its start to its end: taking over what an earlier one left, and leaving it to the next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable

from capsem.model.errors import CapsemError, Corrupt, Unavailable, Unsupported
from capsem.model.ids import check_name
from capsem.model.lifecycle import State
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.service.link import Link
from capsem.service.members import Members
from capsem.service.vm import Vm
from capsem.store import durable, records
from capsem.store.layout import SessionDir
from capsem.store.locks import Lock, holders, is_locked, try_lock
from capsem.store.naming import take_naming

POOLED = "pool-"  # how names of VMs of the pool begin
ADOPT_LIMIT = 10.0  # seconds for a living supervisor to answer
ADOPT_TURN = 0.02  # seconds between looks whether a supervisor that has just begun listens
SUSPEND_LIMIT = 8.0  # seconds for all VMs together to be suspended when the service stops
TERMINATE_LIMIT = 2.0  # seconds between SIGTERM and SIGKILL for those that are not, or not in time

log = logging.getLogger("capsem_service.fleet")


class Fleet(Members):
    """The VMs of a service, through its life."""

    async def reconcile(self) -> None:
        """Take over what an earlier service left: adopt living supervisors, settle the rest, sweep remains.

        Meanwhile we hold the claim of every VM at rest: a supervisor that the earlier service has spawned may just be about
        to begin, with a layer of which no record tells yet. It finds the claim taken, and ends; or its layer gone.
        """
        found: list[tuple[Vm, Lock | None]] = []
        self._taking_over = True
        with contextlib.ExitStack() as held:
            for session in records.sessions(self.layout):
                try:
                    claim = try_lock(session.claim)
                    if claim is not None:
                        held.callback(claim.release)
                    found.append((self._found(session), claim))
                except (CapsemError, OSError) as error:
                    self._skipped = True
                    log.error("%s is skipped: %s", session.path, error)
            await asyncio.gather(*(self._take_over(vm, claim) for vm, claim in found))
            self._taking_over = False
            self.write_index()
            self._sweep()
            if self._knows_all():
                await self._sweep_layers()
        self.sum_soon()

    def _found(self, session: SessionDir) -> Vm:
        """The VM of a session directory. Raises InvalidInput for a directory that can be none's."""
        name = check_name(session.path.name)
        persistent = session.path.parent == self.layout.persistent
        try:
            record = records.read(session)
            assigned = name.startswith(POOLED) and record.id != name and not record.nobodys
            if assigned or (record.persistent and not persistent):
                # Its supervisor ended between the record and the move (Changes.persist, Changes.assign).
                target = self.layout.session(record.id, persistent=record.persistent)
                durable.rename(session.path, target.path)
                return self.add(target, record)
            if (record.id, record.persistent) != (name, persistent):
                raise Corrupt(f"{session.record} is the record of another VM, {record.id}")
        except (Corrupt, OSError) as error:
            made = session.record.stat().st_mtime
            vm = self.add(session, VmRecord(name, persistent, VmSpec(), "", "", (), made))
            vm.spoilt(error if isinstance(error, Corrupt) else Corrupt(f"{session.record}: {error}"))
            return vm
        return self.add(session, record)

    async def _take_over(self, vm: Vm, claim: Lock | None) -> None:
        if claim is None and await self._adopt(vm):
            return
        if vm.obstacle is not None:
            return
        await vm.bury_vmm()
        try:
            vm.settle(claim=claim)
        except (CapsemError, OSError) as error:
            log.error("%s: %s", vm.id, error)
            return
        await self.on_gone(vm)
        if vm.record.state == State.DELETING:
            self.remove(vm)
        else:
            self._ended(vm)

    async def _adopt(self, vm: Vm) -> bool:
        """Take over a supervisor that outlived the service that started it; False: it ended meanwhile.

        One that cannot be spoken to is listed with the reason, and can be stopped.
        """
        link, socket = Link(), self.layout.instance_socket(vm.id)
        try:
            self.layout.make_socket_directory(socket)
            async with asyncio.timeout(ADOPT_LIMIT):
                # It may have been started just now.
                while is_locked(vm.session.claim) and not socket.exists():
                    await asyncio.sleep(ADOPT_TURN)
                await link.connect(self.system, socket)
        except (CapsemError, OSError) as error:
            if not is_locked(vm.session.claim):
                return False
            log.error("the supervisor of %s cannot be spoken to: %s", vm.id, error)
            if not isinstance(error, Unsupported):
                error = Unavailable(f"its supervisor does not answer: {error}", hint="stop the VM and resume it")
            found = holders(vm.session.claim)
            vm.begin_apart(link.pid or (found[0] if len(found) == 1 else 0), error)
            return True
        log.info("adopted %s, supervised by process %d", vm.id, link.pid)
        vm.begin(None, link)
        return True

    def _sweep(self) -> None:
        """Remove what belongs to no VM: sockets, ready files, half-made session directories, half-written files."""
        known = set(self._vms)
        for path in self.layout.instances.iterdir():
            if path.stem not in known or not self._vms[path.stem].running:
                path.unlink(missing_ok=True)
        for parent in (self.layout.sessions, self.layout.persistent):
            for path in parent.iterdir():
                if "-failed-" not in path.name and not SessionDir(path).record.exists() and path.is_dir():
                    log.warning("removing half-made session directory %s", path)
                    durable.remove_tree(path)
        at_rest = (vm.session.path for vm in self._vms.values() if not vm.running)
        for parent in (self.layout.run_dir, self.layout.layers, self.layout.volumes, *at_rest):
            for path in parent.glob(f"{durable.TEMPORARY}*"):
                path.unlink(missing_ok=True)

    async def _sweep_layers(self) -> None:
        """Remove what nobody names. Drafts, which may be gigabytes, go while the service serves already."""
        drafts = self.checkpoints.abandoned()
        for draft in drafts:
            log.warning("removing the unfinished checkpoint %s", draft.id)
        self.discard(drafts)
        self.collect()
        try:
            lock = await take_naming(self.layout, shared=False)
        except (CapsemError, OSError) as error:
            log.error("layers that nobody names stay until the service starts again: %s", error)
            return
        try:
            self._remove_unnamed()
        finally:
            lock.release()

    def _remove_unnamed(self) -> None:
        """With the lock by which nobody comes to name a layer meanwhile."""
        for vm in self._vms.values():
            if vm.running:  # its supervisor may have named one since it was taken over, or before it listened
                vm.reload()
        used = self._used_layers()
        for checkpoint_id, error in self.checkpoints.unreadable.items():
            log.error("no layer is removed as long as checkpoint %s is there: %s", checkpoint_id, error)
        for path in self.layout.layers.iterdir():
            if path.stem not in used and path.suffix in (".qcow2", ".sum"):
                log.warning("removing unreferenced layer %s", path.name)
                path.unlink(missing_ok=True)

    async def stop_all(self, suspend: Callable[[str], Awaitable[object]] | None = None) -> None:
        """End every supervisor; ephemeral VMs go with it. `suspend` is tried first on what is persistent and ready."""
        self._stop()
        running = [vm for vm in self._vms.values() if vm.running]
        saved = [vm for vm in running if suspend and vm.record.persistent and vm.link is not None and vm.link.ready]
        suspending = [asyncio.ensure_future(suspend(vm.id)) for vm in saved if suspend is not None]
        saving = _within(SUSPEND_LIMIT, dict(zip(saved, suspending, strict=True)))
        ending = [] if self.apart else [vm for vm in running if vm not in saved]
        await asyncio.gather(saving, _terminate(ending))
        await _terminate([vm for vm in running if vm.running])
        await asyncio.gather(*self._clearing, *self._sweeping, return_exceptions=True)

    def leave_all(self) -> None:
        """Let go of every supervisor without a word, for the next service to find."""
        self._stop()
        for vm in self._vms.values():
            vm.let_go()

    def _stop(self) -> None:
        self.stopping = True
        if self._summing is not None:
            self._summing.cancel()


async def _within(limit: float, suspending: dict[Vm, asyncio.Future[object]]) -> None:
    """Wait for these to be suspended; what is not done in time is left to its supervisor."""
    if not suspending:
        return
    await asyncio.wait(suspending.values(), timeout=limit)
    for vm, task in suspending.items():
        if not task.done():
            log.warning("%s is not suspended after %.0f s and will be stopped", vm.id, limit)
            task.cancel()
        elif not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s cannot be suspended and will be stopped: %s", vm.id, error)
    await asyncio.gather(*suspending.values(), return_exceptions=True)


async def _terminate(vms: list[Vm]) -> None:
    """SIGTERM, two seconds, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for vm in vms:
            vm.terminate(number)
        await asyncio.gather(*(vm.ended(TERMINATE_LIMIT) for vm in vms))
