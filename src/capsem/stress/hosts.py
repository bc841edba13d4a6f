"""Services for a stress test: each a process with a home of its own, and what is left of it in the end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from capsem import faults
from capsem.client.service import find_command
from capsem.client.sync import Client
from capsem.model.errors import CapsemError, HostNotReady
from capsem.store import gate as store_gate
from capsem.stress.options import SIM, Options

GATE: Final = "CAPSEM_GATE"  # the simulated host is one of our own, and so is its gate
CALL_WITHIN: Final = 180.0  # seconds; what takes longer hangs
_START_WITHIN: Final = 30.0  # seconds; a service that was killed may find much to put right
_STOP_WITHIN: Final = 20.0
_TURN: Final = 0.05
_DELAY: Final = 0.5
# A fault that makes nobody wait for a minute. The service's steps are not for a VMM, and some have none yet.
_KINDS: Final = ("kill", "kill-vmm", "enospc", "delay")


class Service:
    """A service process with its home. It is started again when it died of a fault."""

    def __init__(self, home: Path, options: Options, environ: Mapping[str, str]) -> None:
        home.mkdir(mode=0o700)
        self.home = home
        self.run_dir = home / "run"
        self.orders = home / "orders"
        self.faults: list[str] = []
        self._restarting = threading.Lock()
        self._environ = {
            **environ,
            "CAPSEM_TEMPLATES": "off",  # nothing may be left, and a template would be
            "CAPSEM_HOME": str(home),
            "CAPSEM_RUN_DIR": str(self.run_dir),
            "CAPSEM_HYPERVISOR": options.hypervisor,
            "CAPSEM_MAX_CONCURRENT_VMS": str(options.machines + 2),
            "CAPSEM_ON_SERVICE_STOP": "stop",
        }
        if options.hypervisor == SIM:
            self._environ["CAPSEM_SIM"] = f"seed={options.seed} host={home.parent / 'simulated-host'}"
            self._environ[GATE] = str(home.parent / "gate") if options.gate else store_gate.OFF
        if options.faults:
            self._environ[faults.VARIABLE] = str(self.orders)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> Client:
        """Of this service."""
        return Client(self.run_dir / "service.sock", timeout=CALL_WITHIN)

    def start(self) -> None:
        """Start it, and wait until it answers. Raises HostNotReady with its last words."""
        argv = [*find_command(self._environ), "--foreground", "--parent-pid", str(os.getpid())]
        said = self.home / "service.err"
        with said.open("ab") as output:
            # In a session of its own: a Ctrl-C at the terminal is for us, who then end it in order.
            self._process = subprocess.Popen(
                argv,
                env=self._environ,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_WITHIN
        while True:
            with contextlib.suppress(CapsemError):
                self.client.call("version")
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = said.read_text(errors="replace").strip()[-500:]
                raise HostNotReady(f"capsem-service does not start: {words or 'it says nothing'}", hint="capsem doctor")
            time.sleep(_TURN)

    def revive(self) -> bool:
        """Start it again if it has died; whether it had."""
        with self._restarting:
            if self._process is None or self._process.poll() is None:
                return False
            self.start()
            return True

    def end_faults(self) -> None:
        """Take note of a fault that has happened, and back an order that nobody has carried out."""
        taken = self.orders.with_name(f"{self.orders.name}.taken")
        with contextlib.suppress(FileNotFoundError):
            self.faults.append(taken.read_text().strip())
            taken.unlink()
        self.orders.unlink(missing_ok=True)

    @property
    def faults_happened(self) -> int:
        """How many have."""
        taken = self.orders.with_name(f"{self.orders.name}.taken")
        return len(self.faults) + taken.exists()

    def order_fault(self, chance: random.Random) -> None:
        """Give an order, in the place of the last one."""
        self.end_faults()
        kind = chance.choice(_KINDS)
        steps = sorted(faults.WRITES) if kind == "enospc" else sorted({**faults.SUPERVISOR, **faults.SERVICE})
        if kind == "kill-vmm":
            steps = [step for step in faults.SUPERVISOR if not step.endswith((".claimed", ".begun"))]
        waiting = self.orders.with_name("next-order")
        waiting.write_text(f"{chance.choice(steps)} {kind} {_DELAY}\n")
        waiting.replace(self.orders)

    def stop(self) -> None:
        """End it in order, else by force; afterwards nothing of it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Supervisors and VMMs: whatever names something in the run directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if f"{self.run_dir}/".encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def remains(self) -> list[str]:
        """What there still is after all VMs were deleted, and must not be."""
        found = [f"process {pid}" for pid in self.processes()]
        for directory in ("store/layers", "store/checkpoints", "persistent", "instances"):
            found += [f"{directory}/{path.name}" for path in (self.run_dir / directory).glob("*")]
        found += [str(path.relative_to(self.run_dir)) for path in self.run_dir.rglob(".tmp-*")]
        return found

    def logs(self, vm_id: str | None = None) -> Iterator[Path]:
        """Log files: the service's, and those of one VM or of all."""
        yield from self.run_dir.glob("service.log*")
        for parent in ("persistent", "sessions"):
            for session in (self.run_dir / parent).glob("*"):
                if vm_id is None or session.name == vm_id or session.name.startswith(f"{vm_id}-failed-"):
                    yield from (path for path in session.iterdir() if path.suffix in (".log", ".json"))


def start_services(root: Path, options: Options, environ: Mapping[str, str]) -> list[Service]:
    """The services of a stress test, started. Raises HostNotReady; then none runs."""
    services: list[Service] = []
    try:
        for number in range(options.services):
            service = Service(root / str(number), options, environ)
            services.append(service)
            service.start()
    except BaseException:
        for service in services:
            service.stop()
        raise
    return services
