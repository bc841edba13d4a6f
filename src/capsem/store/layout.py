"""Every file name under the run directory, once. docs/state-directory.md describes them for people.

<run_dir>/service.sock, service.lock, service.log, service.pid
<run_dir>/persistent_registry.json     an index for other tools; the truth is each VM's vm.json
<run_dir>/instances/<id>.sock          a running VM's supervisor, mode 0600
<run_dir>/instances/<id>.ready         empty; there while the guest is ready
<run_dir>/sessions/<id>/               session directory of an ephemeral VM, mode 0700
<run_dir>/sessions/<id>-failed-<x>/    kept for a post-mortem
<run_dir>/persistent/<name>/           session directory of a persistent VM
<run_dir>/store/layers/<object id>.qcow2   layers of volumes; never renamed, never rewritten once committed
<run_dir>/store/layers/<object id>.sum     a frozen layer's checksum, made some time after it was frozen
<run_dir>/store/naming.lock            flock: see capsem.store.naming
<run_dir>/store/volumes/<MiB>.raw      empty formatted volumes of other than the image's size
<run_dir>/store/checkpoints/<object id>/   a checkpoint (class CheckpointDir); one without a manifest is a draft
<run_dir>/store/ram/empty-<MiB>.ram    sparse, shared by all machines of that size that boot cold
<run_dir>/traces/<id>.jsonl            what was done for requests that somebody wanted to see through (capsem.tracing)
<session_dir>/vm.json                  the VM's record
<session_dir>/claim                    flock: held by the one supervisor (or a service at rest) that owns the VM
<session_dir>/vmm.lock                 flock: held by the VMM process through an inherited descriptor
<session_dir>/process.log, serial.log  the supervisor's log; the guest's console; pty.log: what was shown on its terminals
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from capsem.model.errors import HostNotReady

SOCKET_PATH_LIMIT = 90  # bytes; sockaddr_un has 108, and the contract promises less
LONGEST_SOCKET = 107  # bytes that a socket's address has room for


@dataclass(frozen=True, slots=True)
class SessionDir:
    """The files of one VM's session directory."""

    path: Path

    @property
    def record(self) -> Path:
        """The VM's record."""
        return self.path / "vm.json"

    @property
    def claim(self) -> Path:
        """The claim's lock file."""
        return self.path / "claim"

    @property
    def vmm_lock(self) -> Path:
        """The VMM's lock file."""
        return self.path / "vmm.lock"

    @property
    def process_log(self) -> Path:
        """The supervisor's log."""
        return self.path / "process.log"

    @property
    def serial_log(self) -> Path:
        """The guest's console."""
        return self.path / "serial.log"

    @property
    def ledger(self) -> Path:
        """What happened in the VM, as SQLite tables (docs/ledger.md)."""
        return self.path / "session.db"

    @property
    def pty_log(self) -> Path:
        """What its terminals showed."""
        return self.path / "pty.log"


@dataclass(frozen=True, slots=True)
class CheckpointDir:
    """The files of one checkpoint; docs/checkpoint-format.md says what is in them."""

    path: Path

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return self.path.name

    @property
    def manifest(self) -> Path:
        """Written last: with it the checkpoint is committed, without it there is only a draft."""
        return self.path / "manifest.json"

    @property
    def memory(self) -> Path:
        """The guest's RAM, and an identity behind it."""
        return self.path / "memory.ram"

    @property
    def sums(self) -> Path:
        """A checksum for each page of RAM."""
        return self.path / "memory.sums"

    @property
    def devices(self) -> Path:
        """The state of the virtual devices, as the hypervisor wrote it."""
        return self.path / "devices.state"

    @property
    def jobs(self) -> Path:
        """Commands that were under way, and what they had written so far."""
        return self.path / "jobs.state"

    @property
    def names(self) -> Path:
        """Which names the guest had been given which addresses for."""
        return self.path / "names.state"

    @property
    def console(self) -> Path:
        """What the guest's console had said, for the logs of forks; there may be none, and nothing depends on it."""
        return self.path / "console.log"

    @property
    def draft(self) -> Path:
        """flock: held by whoever makes the checkpoint."""
        return self.path / "draft"


@dataclass(frozen=True)
class Layout:
    """The files of one run directory (canonical, absolute)."""

    run_dir: Path

    @cached_property
    def socket(self) -> Path:
        """Default socket of the service."""
        return self.run_dir / "service.sock"

    @cached_property
    def registry(self) -> Path:
        """Index of the persistent VMs."""
        return self.run_dir / "persistent_registry.json"

    @cached_property
    def instances(self) -> Path:
        """Directory of sockets and ready files."""
        return self.run_dir / "instances"

    @cached_property
    def sessions(self) -> Path:
        """Directory of ephemeral VMs."""
        return self.run_dir / "sessions"

    @cached_property
    def persistent(self) -> Path:
        """Directory of persistent VMs."""
        return self.run_dir / "persistent"

    @cached_property
    def layers(self) -> Path:
        """Directory of volume layers."""
        return self.run_dir / "store" / "layers"

    @cached_property
    def naming_lock(self) -> Path:
        """Held while a layer comes to be named, or what nobody names is swept."""
        return self.run_dir / "store" / "naming.lock"

    @cached_property
    def volumes(self) -> Path:
        """Directory of empty volumes."""
        return self.run_dir / "store" / "volumes"

    @cached_property
    def ram(self) -> Path:
        """Directory of RAM files."""
        return self.run_dir / "store" / "ram"

    @cached_property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.run_dir / "store" / "checkpoints"

    @property
    def traces(self) -> Path:
        """Directory of the latest traces; made when the first is wanted."""
        return self.run_dir / "traces"

    def checkpoint(self, checkpoint_id: str) -> CheckpointDir:
        """The directory of a checkpoint."""
        return CheckpointDir(self.checkpoints / checkpoint_id)

    def session(self, vm_id: str, *, persistent: bool) -> SessionDir:
        """The session directory of a VM."""
        return SessionDir((self.persistent if persistent else self.sessions) / vm_id)

    def instance_socket(self, vm_id: str) -> Path:
        """The supervisor's socket; outside the run directory when that path is too long for a socket."""
        path = self.instances / f"{vm_id}.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
        return Path(tempfile.gettempdir()) / f"capsem-{os.getuid()}" / f"{digest}.sock"

    def make_socket_directory(self, socket: Path) -> None:
        """Make the directory of a supervisor's socket, where it is missing. Raises HostNotReady: somebody else made it, who
        would get what is meant for the supervisor, as anybody can where directories are everybody's to make."""
        directory = socket.parent
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        info = directory.lstat()
        if directory != self.instances and (
            not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022
        ):
            raise HostNotReady(
                f"{directory} is not a directory of yours alone",
                hint="remove it, or set CAPSEM_RUN_DIR to a shorter path, beside which sockets need no other place",
            )

    def ready_file(self, vm_id: str) -> Path:
        """There while the guest is ready."""
        return self.instances / f"{vm_id}.ready"

    def layer(self, layer_id: str) -> Path:
        """A qcow2 layer."""
        return self.layers / f"{layer_id}.qcow2"

    def layer_sum(self, layer_id: str) -> Path:
        """A frozen layer's checksum."""
        return self.layers / f"{layer_id}.sum"

    def volume(self, size_mb: int) -> Path:
        """An empty formatted volume."""
        return self.volumes / f"{size_mb}.raw"

    def empty_ram(self, size_mb: int) -> Path:
        """The sparse file behind the memory of machines that boot cold."""
        return self.ram / f"empty-{size_mb}.ram"

    def create(self) -> None:
        """Make all directories, mode 0700. Raises OSError; HostNotReady: one is there that we may not write to."""
        store = (self.layers, self.volumes, self.ram, self.checkpoints)
        for path in (self.run_dir, self.instances, self.sessions, self.persistent, *store):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise HostNotReady(
                    f"{path} may not be written to",
                    hint=f"it is somebody else's, perhaps root's: `sudo chown -R $USER {self.run_dir}` makes all yours",
                )
