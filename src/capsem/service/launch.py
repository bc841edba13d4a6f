"""How a supervisor is started: its command line, its parameters, and the little environment it gets."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capsem import faults, tracing
from capsem.api.internal import BOUND, PROTOCOL, Bootstrap
from capsem.hypervisor.driver import Accelerator
from capsem.image.catalog import Image
from capsem.model.errors import HostNotReady, MachineFailed
from capsem.model.vm import VmRecord
from capsem.service.link import Link
from capsem.service.spares import Spares
from capsem.store.layout import Layout, SessionDir
from capsem.store.lines import last_lines
from capsem.system import Child, System
from capsem.tracing import span
from capsem.wire.schema import encode_message

# Nothing else of the service's environment reaches a supervisor: a user's secrets stay here (interface.md 1.3).
PASSED_ON = (
    "HOME PATH USER TMPDIR CAPSEM_HOME CAPSEM_USER_CONFIG CAPSEM_CORP_CONFIG RUST_LOG "
    "CAPSEM_VM_ID CAPSEM_TRACE_ID TRACEPARENT CAPSEM_QEMU CAPSEM_SIM CAPSEM_HOSTS"
).split()
BIND_LIMIT = 15.0  # seconds for a supervisor to come up
LOG_LINES = 20

log = logging.getLogger("capsem_service.launch")


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a supervisor."""
    return {name: environ[name] for name in PASSED_ON if environ.get(name)}


@dataclass(frozen=True, slots=True)
class Boot:
    """How a VM is to come up: from `memory`, the RAM of its checkpoint, or from the beginning; with `layer` on top of
    its volume, which the supervisor makes durable, where what is on top now must not be written to."""

    kind: str = "cold"
    note: str | None = None
    memory: Path | None = None
    layer: str | None = None
    network: str = ""  # the layers of its policy
    secrets: str = ""  # what it is lent
    ledger: bool = True  # record commands, files and traffic


def assets(image: Image) -> dict[str, str]:
    """What of an image a restored machine must find unchanged, by digest."""
    files = image.manifest.files
    return {"image": image.digest, "kernel": files["kernel"].digest, "initrd": files["initrd"].digest}


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts supervisors."""

    system: System
    layout: Layout
    environ: Mapping[str, str]
    process_binary: Path
    hypervisor: str
    parent_pid: int | None = None
    log_level: str = "info"
    spares: Spares | None = None
    gate: Path | None = None  # the host-wide lock, where supervisors need it

    async def start(
        self, record: VmRecord, session: SessionDir, image: Image, volume: Path, accelerator: Accelerator, boot: Boot
    ) -> tuple[Child, Link]:
        """Start a supervisor and connect to it; the machine is then about to be started.

        Raises HostNotReady, MachineFailed with the end of its log; OSError when it ended while we connected.
        """
        socket, ready = self.layout.instance_socket(record.id), self.layout.ready_file(record.id)
        self.layout.make_socket_directory(socket)
        # Left over from an earlier run, they would be taken for this one's.
        socket.unlink(missing_ok=True)
        ready.unlink(missing_ok=True)
        bootstrap = Bootstrap(
            protocol=PROTOCOL,
            run_dir=str(self.layout.run_dir),
            socket=str(socket),
            ready_file=str(ready),
            kernel=str(image.kernel),
            initrd=str(image.initrd),
            root=str(image.root),
            volume=str(volume),
            ram_file=str(boot.memory or empty_ram(self.layout, record.spec.ram_mb)),
            kernel_command_line=image.kernel_command_line,
            accelerator=accelerator,
            hypervisor=self.hypervisor,
            vm_id=record.id,
            session_dir=str(session.path),
            assets=assets(image),
            restore=boot.memory is not None,
            layer=boot.layer,
            boot_kind=boot.kind,
            boot_note=boot.note,
            # What is nobody's is its service's: no other one takes it over.
            parent_pid=self.system.processes.own_pid() if record.nobodys else self.parent_pid,
            log_level=self.log_level,
            ledger=boot.ledger,
            network=boot.network,
            secrets=boot.secrets,
            gate=str(self.gate or ""),
            trace=trace.name if (trace := tracing.active()) is not None else "",
            faults=self.environ.get(faults.VARIABLE) or None,
        )
        argv = [str(self.process_binary), "--id", record.id, "--session-dir", str(session.path)]
        data = encode_message(bootstrap)
        with span("hand over to a spare supervisor"):
            spare = await self.spares.take(data, len(" ".join(argv[1:]))) if self.spares else None
        child = spare or await self._spawn(argv, data, session)
        try:
            async with asyncio.timeout(BIND_LIMIT):
                with span("wait for the supervisor's socket"):
                    while await child.read_line() != BOUND:
                        if await child.wait() >= 0 or child is not spare:
                            raise MachineFailed(
                                f"the supervisor of {record.id} ended at once: {last_lines(session.process_log, LOG_LINES)}",
                                hint=f"capsem logs {record.id}",
                            )
                        # Whoever killed it meant another, or all of them: this VM's start has not begun.
                        log.warning("%s: the spare supervisor was killed (%s)", record.id, child.status)
                        socket.unlink(missing_ok=True)
                        child = await self._spawn(argv, data, session)
                link = Link()
                with span("connect to the supervisor"):
                    await link.connect(self.system, socket)
        except BaseException as error:
            if child.status is None:
                self.system.processes.signal(child.pid, 9)
                await child.wait()
            if isinstance(error, TimeoutError):
                raise MachineFailed(
                    f"the supervisor of {record.id} did not come up within {BIND_LIMIT:.0f} s"
                ) from error
            raise
        return child, link

    async def _spawn(self, argv: Sequence[str], data: bytes, session: SessionDir) -> Child:
        try:
            with span("spawn a supervisor"):
                return await self.system.processes.spawn(
                    argv, env=passed_on(self.environ), stdin=data, log=session.process_log
                )
        except OSError as error:
            raise HostNotReady(
                f"{self.process_binary} cannot be started: {error.strerror}",
                hint="reinstall Capsem, or give --process-binary",
            ) from error


def empty_ram(layout: Layout, size_mb: int) -> Path:
    """The sparse file that machines of this size map privately when they boot cold; made when missing."""
    path = layout.empty_ram(size_mb)
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(size_mb << 20)
        temporary.rename(path)
    return path


def find_process_binary(name: str = "capsem-process") -> Path:
    """The supervisor's program: beside this one, else in PATH. Raises HostNotReady."""
    beside = Path(sys.argv[0]).resolve().parent / name
    for candidate in (beside, Path(sys.executable).parent / name):
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which(name)
    if found is None:
        raise HostNotReady(f"{name} is not installed beside capsem-service nor in PATH", hint="reinstall Capsem")
    return Path(found)
