"""What `capsem doctor` looks at: this host, and a VM made for the purpose.

Every check says what it found and, unless that is fine, the command that mends it. A check never raises.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

from capsem import __version__, config
from capsem.client import daemon
from capsem.config import Paths
from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.hypervisor.qemu.process import find_qemu, query_version
from capsem.image.catalog import Catalog
from capsem.image.host import PACKAGE_OF, Host
from capsem.model.errors import CapsemError, HostNotReady
from capsem.store.layout import LONGEST_SOCKET, SOCKET_PATH_LIMIT

OLDEST_PYTHON: Final = (3, 11)
BUILD_TOOLS: Final = ("mmdebstrap", "mkfs.erofs", "mke2fs", "zstd")
DISK_NEEDED, DISK_WANTED = 1 << 30, 5 << 30
MEMORY_NEEDED = 768 << 20  # a VM of 512 MiB, and the VMM around it
CLOCK_TOLERANCE: Final = 1.0  # seconds
GUEST_LIMIT: Final = 60  # seconds for a check inside
VM: Final[Mapping[str, Any]] = {"ram_mb": 512, "cpus": 1}


class Status(StrEnum):
    """How a check went; `warning` is something to know, not something that has to be mended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fix` is what mends it: a command, where there is one."""

    name: str
    status: Status
    found: str
    fix: str | None = None


class Caller(Protocol):
    """What of a Client the checks inside a VM need."""

    def call(
        self, operation_name: str, *, vm_id: str | None = None, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Do an operation of the service."""


def _ok(name: str, found: str) -> Check:
    return Check(name, Status.OK, found)


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    """The check, or the error that came of it."""
    try:
        return look()
    except CapsemError as exc:
        return Check(name, Status.FAILED, exc.message, exc.hint)
    except Exception as exc:  # noqa: BLE001  a doctor who faints is of no help
        return Check(name, Status.FAILED, f"{type(exc).__name__}: {exc}", "capsem doctor --bundle, and report it")


# -- the host


def host_checks(paths: Paths, environ: Mapping[str, str], *, fast: bool) -> Iterator[Check]:
    """What is to be seen without a VM; `fast` leaves out what reads the whole image. Blocks. The run directory is made
    if it is not there."""
    checks: dict[str, Callable[[], Check]] = {
        "python": _python,
        "run directory": lambda: _run_directory(paths.run_dir),  # early: others write there
        "qemu": lambda: _qemu(environ),
        "accelerator": lambda: _accelerator(paths),
        "build tools": lambda: _build_tools(environ),
        "image": lambda: _image(environ, fast=fast),
        "settings": lambda: _settings(environ),
        "disk space": lambda: _disk_space(paths.run_dir),
        "socket path": lambda: _socket_path(paths),
        "memory": _memory,
        "service": lambda: _service(paths),
    }
    for name, look in checks.items():
        yield _guarded(name, look)


def _python() -> Check:
    found = f"Python {sys.version.split()[0]}, capsem {__version__}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", Status.FAILED, found, "install Python 3.11 or newer, and Capsem into it")
    return _ok("python", found)


def _qemu(environ: Mapping[str, str]) -> Check:
    binary = find_qemu(environ)
    return _ok("qemu", f"QEMU {asyncio.run(query_version(binary))} ({binary})")


def _accelerator(paths: Paths) -> Check:
    verdict = asyncio.run(QemuDriver(paths.run_dir / "cache").verdict())
    if verdict.accelerator is Accelerator.KVM:
        return _ok("accelerator", f"KVM: {verdict.reason}")
    found = f"software emulation (TCG), which is slower: {verdict.reason}"
    if "no /dev/kvm" in verdict.reason:
        fix = "modprobe kvm_intel || modprobe kvm_amd; in a VM, nested virtualisation is for its host to allow"
    elif "may not be opened" in verdict.reason:
        fix = 'sudo usermod -aG kvm "$USER", then log in again'
    else:
        fix = "none needed; for speed, run on a host whose KVM works"
    return Check("accelerator", Status.WARNING, found, fix)


def _build_tools(environ: Mapping[str, str]) -> Check:
    path = (environ.get("PATH") or os.defpath) + ":/usr/sbin:/sbin"
    ordinary = os.geteuid() != 0
    wanted = (*BUILD_TOOLS, "newuidmap") if ordinary else BUILD_TOOLS
    missing = [tool for tool in wanted if shutil.which(tool, path=path) is None]
    if not missing:
        if ordinary:
            try:
                Host().require_user_namespace()
                Host().require_user_ids()
            except HostNotReady as exc:
                return Check("build tools", Status.WARNING, exc.message, exc.hint)
        return _ok("build tools", ", ".join(wanted))
    packages = " ".join(dict.fromkeys(PACKAGE_OF[tool] for tool in missing))
    found = f"missing: {', '.join(missing)} (wanted for `capsem image build` alone)"
    return Check("build tools", Status.WARNING, found, f"sudo apt-get install -y {packages}")


def _image(environ: Mapping[str, str], *, fast: bool) -> Check:
    catalog = Catalog.from_environment(environ)
    image = catalog.find()
    if not fast:
        catalog.verify(image)
    seen = "files and sizes are right" if fast else "every byte is as it was made"
    return _ok("image", f"{image.name} {image.digest[:12]} in {image.directory}: {seen}")


def _settings(environ: Mapping[str, str]) -> Check:
    settings = config.load(environ)
    if settings.warnings:
        return Check("settings", Status.WARNING, "; ".join(settings.warnings), "correct the name in that file")
    return _ok("settings", f"at most {settings.max_concurrent_vms} VMs at once")


def _run_directory(run_dir: Path) -> Check:
    fix = f"make {run_dir} a directory that you own, or set CAPSEM_RUN_DIR to another one"
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"capsem")
            file.flush()
            os.fsync(file.fileno())
        mode = run_dir.stat().st_mode & 0o777
    except OSError as exc:
        return Check("run directory", Status.FAILED, f"{run_dir} cannot be written: {exc.strerror or exc}", fix)
    if mode & 0o077:
        found = f"{run_dir} is open to other users (mode {mode:o})"
        return Check("run directory", Status.WARNING, found, f"chmod 700 {run_dir}")
    return _ok("run directory", f"{run_dir} can be written")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # behind what we may not look into
        return False


def _disk_space(run_dir: Path) -> Check:
    # One that cannot be made is told of by itself; what there is of its path is where it would be.
    free = shutil.disk_usage(next(filter(_is_there, (run_dir, *run_dir.parents)))).free
    found = f"{free / 2**30:.1f} GiB free for {run_dir}"
    if free >= DISK_WANTED:
        return _ok("disk space", found)
    status = Status.WARNING if free >= DISK_NEEDED else Status.FAILED
    return Check("disk space", status, found, "capsem df shows what takes room; capsem delete or purge make some")


def _socket_path(paths: Paths) -> Check:
    length = len(os.fsencode(paths.socket))
    found = f"{length} bytes: {paths.socket}"
    if length <= SOCKET_PATH_LIMIT:
        return _ok("socket path", found)
    status = Status.WARNING if length <= LONGEST_SOCKET else Status.FAILED
    return Check("socket path", status, f"{found} is long", "set CAPSEM_RUN_DIR to a shorter path")


def _memory() -> Check:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available, total = (int(lines[key].split()[0]) << 10 for key in ("MemAvailable", "MemTotal"))
    found = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB available"
    if available >= MEMORY_NEEDED:
        return _ok("memory", found)
    return Check("memory", Status.FAILED, found, "stop a VM (capsem stop SESSION) or another program")


def _service(paths: Paths) -> Check:
    found = daemon.look(paths)
    if found.version is None:
        if found.pid is not None:
            text = f"process {found.pid} does not answer at {paths.socket}"
            return Check("service", Status.FAILED, text, "capsem stop; capsem start")
        if paths.explicit:
            text = f"nobody answers at {paths.socket}"
            return Check("service", Status.FAILED, text, "start it there, or leave --uds-path out")
        return _ok("service", "not running; it is started when it is wanted")
    if found.version != __version__:
        text = f"version {found.version} is running, this is {__version__}"
        return Check("service", Status.FAILED, text, "capsem stop; capsem start")
    return _ok("service", f"version {found.version}, process {found.pid or '?'}, VMs running: {found.running_vms}")


# -- a VM


def guest_checks(client: Caller) -> Iterator[Check]:
    """Make a small ephemeral VM, look at it from inside, and destroy it again, also when the caller goes away. Blocks,
    and starts the service if `client` does that."""
    began = time.monotonic()
    vm_id = ""

    def boot() -> Check:
        nonlocal vm_id
        vm_id = client.call("provision", body=VM)["id"]
        _output(client, vm_id, "true")
        return _ok("vm boots", f"{vm_id} ready in {time.monotonic() - began:.1f} s")

    try:
        booted = _guarded("vm boots", boot)
        yield booted
        if booted.status is Status.OK:
            for name, look in INSIDE.items():
                yield _named(f"vm {name}", look, client, vm_id)
    except BaseException:
        if vm_id:
            _guarded("vm deleted", lambda: _delete(client, vm_id))
        raise
    if vm_id:
        yield _guarded("vm deleted", lambda: _delete(client, vm_id))


def _named(name: str, look: Callable[[Caller, str], str], client: Caller, vm_id: str) -> Check:
    """A check inside: it returns what it found, or raises _Wrong."""

    def check() -> Check:
        try:
            return _ok(name, look(client, vm_id))
        except _Wrong as exc:
            fix = f"capsem image verify; if that is fine: capsem doctor --bundle, and report it ({vm_id})"
            return Check(name, Status.FAILED, str(exc), fix)

    return _guarded(name, check)


class _Wrong(Exception):
    """What was found inside is not what ought to be there."""


def _expect(condition: bool, found: str) -> str:
    if not condition:
        raise _Wrong(found)
    return found


def _output(client: Caller, vm_id: str, command: str) -> str:
    answer = client.call("exec", vm_id=vm_id, body={"command": command, "timeout_secs": GUEST_LIMIT})
    words = (answer["stdout"] + answer["stderr"]).strip()
    if answer["exit_code"] != 0:
        raise _Wrong(f"`{command}` ended with {answer['exit_code']}: {words[-200:]}")
    return str(answer["stdout"])


def _delete(client: Caller, vm_id: str) -> Check:
    began = time.monotonic()
    client.call("delete", vm_id=vm_id)
    return _ok("vm deleted", f"in {1000 * (time.monotonic() - began):.0f} ms")


def _exec(client: Caller, vm_id: str) -> str:
    answer = client.call("exec", vm_id=vm_id, body={"command": "echo out; echo err >&2; exit 7"})
    seen = (answer["stdout"], answer["stderr"], answer["exit_code"])
    _expect(seen == ("out\n", "err\n", 7), f"a command's output and exit code came back as {seen}")
    return "output, errors and exit code come back"


def _files(client: Caller, vm_id: str) -> str:
    path, text = f".capsem-doctor-{secrets.token_hex(4)}", "\u00fcber\n" + secrets.token_hex(50_000)
    client.call("write_file", vm_id=vm_id, body={"path": path, "content": text})
    back = client.call("read_file", vm_id=vm_id, body={"path": path})["content"]
    _output(client, vm_id, f"rm /root/{path}")
    _expect(back == text, "a file did not come back as it was sent")
    return f"{len(text.encode()) >> 10} KiB to the VM and back"


def _clock(client: Caller, vm_id: str) -> str:
    before = time.time()
    guest = float(_output(client, vm_id, "date +%s.%N"))
    after = time.time()
    off = min(0.0, guest - before) or max(0.0, guest - after)
    return _expect(abs(off) <= CLOCK_TOLERANCE, f"{abs(off):.2f} s off the host's")


def _workspace(client: Caller, vm_id: str) -> str:
    name = f"/root/.capsem-doctor-{secrets.token_hex(4)}"
    command = f"dd if=/dev/zero of={name} bs=64k count=16 conv=fsync 2>/dev/null && stat -c %s {name}; rm {name}"
    size = _output(client, vm_id, command).strip()
    _expect(size == str(1 << 20), f"1 MiB was written to /root, {size or 0} bytes are there")
    return "/root takes 1 MiB and syncs it"


def _hostname(client: Caller, vm_id: str) -> str:
    name = _output(client, vm_id, "hostname").strip()
    return _expect(name == vm_id, name)


def _network(client: Caller, vm_id: str) -> str:
    links = sorted(_output(client, vm_id, "ls /sys/class/net").split())
    return _expect(set(links) <= {"lo", "dummy0"}, f"interfaces: {', '.join(links)}")


def _root(client: Caller, vm_id: str) -> str:
    kind = _output(client, vm_id, "awk '$2 == \"/\" { kind = $3 } END { print kind }' /proc/mounts").strip()
    return _expect(kind == "overlay", f"/ is {kind}")


def _modules(client: Caller, vm_id: str) -> str:
    # The last ones are loaded behind the agent's back, then no more can be.
    command = "for n in $(seq 300); do read x < /proc/sys/kernel/modules_disabled; [ $x = 1 ] && break; sleep 0.1; done"
    locked = _output(client, vm_id, f"{command}; echo $x").strip() == "1"
    return _expect(locked, "no more kernel modules can be loaded" if locked else "kernel modules can still be loaded")


INSIDE: Final[Mapping[str, Callable[[Caller, str], str]]] = {
    "exec": _exec,
    "files": _files,
    "clock": _clock,
    "workspace": _workspace,
    "hostname": _hostname,
    "network": _network,
    "root": _root,
    "modules": _modules,
}
