"""The empty volume: one ext4 file system that is made once, so that no guest ever has to.

Every VM's writable layer lies on top of such a file, which is never written again. It is sparse, and the storage below
a new file reads as zeroes, so the inode tables are known to be zero: the guest's kernel need not clear them in the
background, which would make every VM's layer grow by itself.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from capsem.guest import health
from capsem.image.host import Host
from capsem.model.errors import InvalidInput
from capsem.model.spec import DISK_MB
from capsem.store import durable

UUID: Final = "7f0c5e5a-8d57-4b6e-9d0c-0c4a95e3b102"
DIRECTORIES: Final = {
    "upper": 0o755,
    "work": 0o700,
    "workspace": 0o700,
}  # the mode of `upper` becomes that of the guest's /

# A small journal: what has once been written to it stays in the VM's layer and in each of its checkpoints.
_JOURNAL_MB: Final = 32
_FEATURES: Final = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
_TIME: Final = 1_700_000_000  # of all that the file system is made with


def format_volume(path: Path, size_mb: int, *, host: Host | None = None) -> None:
    """Make the new file `path`, `size_mb` MiB long but with next to nothing allocated: an ext4 file system that holds
    the three empty directories the guest mounts from, and room for its agent's mark. The same size gives the same bytes.
    Durable on return.

    Raises InvalidInput for a size out of range, HostNotReady without e2fsprogs, MachineFailed, OSError.
    """
    if size_mb not in DISK_MB:
        raise InvalidInput(f"a volume of {size_mb} MiB", hint=f"choose {DISK_MB.start} to {DISK_MB.stop - 1} MiB")
    host = host or Host()
    host.require("mke2fs", "debugfs")
    options = (
        f"assume_storage_prezeroed=1,lazy_itable_init=1,root_owner=0:0,hash_seed={UUID},packed_meta_blocks=1,nodiscard"
    )
    # The host's mke2fs.conf must not decide anything. Both variables fix the time, for older and newer e2fsprogs.
    environment = {
        "MKE2FS_CONFIG": "/dev/null",
        "E2FSPROGS_FAKE_TIME": str(_TIME),
        "SOURCE_DATE_EPOCH": str(_TIME),
    }
    identity = ["-q", "-F", "-t", "ext4", "-O", _FEATURES, "-U", UUID, "-L", "capsem"]
    geometry = ["-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-J", f"size={_JOURNAL_MB}"]
    path.touch(exist_ok=False)  # before the try: what was there already is not ours to remove
    try:
        os.truncate(path, size_mb << 20)
        host.run(["mke2fs", *identity, *geometry, "-E", options, str(path)], env=environment)
        commands = [f"mkdir {name}\nset_inode_field {name} mode 04{mode:04o}\n" for name, mode in DIRECTORIES.items()]
        with tempfile.NamedTemporaryFile() as mark:
            mark.write(b"new".ljust(health.BLOCK, b"\n"))  # no zeroes, which would be left out
            mark.flush()
            commands.append(f"write {mark.name} {health.MARK}\nset_inode_field {health.MARK} mode 0100600\n")
            host.run(["debugfs", "-w", "-f", "-", str(path)], stdin="".join(commands).encode(), env=environment)
        durable.sync_file(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    durable.sync_directory(path.parent)
