"""Who needs which image: what has to be known before one may be removed.

A VM's record names its image. But several services may use one images directory, each with VMs in a run directory of
its own: two checkouts, tests, several users of one installation. So each service leaves a link to its run directory in
`<images>/users/`, which like /tmp is open to everybody, before it makes a VM from an image there. A run directory that is
gone needs nothing; one that belongs to somebody else is not looked into, and may need everything.

Whoever makes a VM holds the images directory's lock, shared, from finding the image until the record is written;
whoever removes images holds it alone. So no record ever names an image that is just being removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from capsem.model.errors import Corrupt, WrongState
from capsem.store import records
from capsem.store.layout import Layout

DIRECTORY: Final = "users"


@contextlib.contextmanager
def locked(images: Path, *, alone: bool) -> Iterator[None]:
    """Hold the lock of an images directory. Blocks for as long as another process finds or removes images in it, which
    is not long; one that is not there has no images and needs no lock."""
    try:
        fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def prepare(images: Path) -> None:
    """Let services tell that they use `images`. Raises OSError."""
    directory = images / DIRECTORY
    with contextlib.suppress(FileExistsError):
        directory.mkdir()
        directory.chmod(0o1777)


def register(images: Path, run_dir: Path) -> None:
    """Tell that VMs in `run_dir` may need images of `images`. Where that cannot be written down, nothing is: a read-only
    directory, put there by other means than `capsem image build`, is its owner's to clear up."""
    link = images / DIRECTORY / hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:16]
    if link.is_symlink() or not images.is_dir():
        return
    with contextlib.suppress(OSError):
        prepare(images)
        link.symlink_to(run_dir)


def needed(images: Path, run_dir: Path) -> dict[str, list[str]]:
    """Digests of images -> the VMs that need them, in `run_dir` and in every run directory known to use `images`.

    Raises WrongState where that cannot be found out.
    """
    found: dict[str, list[str]] = {}
    for place in (run_dir, *sorted({*_registered(images)} - {run_dir})):
        for vm_id, digest in _vms(place):
            found.setdefault(digest, []).append(vm_id if place == run_dir else f"{vm_id} (in {place})")
    return found


def _registered(images: Path) -> Iterator[Path]:
    """The run directories that are still there; links to others are removed."""
    directory = images / DIRECTORY
    for link in directory.iterdir() if directory.is_dir() else ():
        if not link.is_symlink():
            continue
        run_dir = link.readlink()
        try:
            run_dir.lstat()
        except (FileNotFoundError, NotADirectoryError):
            with contextlib.suppress(OSError):  # another user's link, a directory we may only read
                link.unlink()
            continue
        except OSError:
            pass  # there may be something
        yield run_dir


def _vms(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Id and image of each VM. Raises WrongState when the directory is not ours, or when a record cannot be read."""
    try:
        if run_dir.stat().st_uid != os.geteuid():
            raise PermissionError
        sessions = records.sessions(Layout(run_dir))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        raise WrongState(
            f"VMs in {run_dir}, which is not yours to read, may need the image",
            hint="`capsem image rm --force` removes it all the same",
        ) from exc
    for session in sessions:
        try:
            record = records.read(session)
        except FileNotFoundError:
            continue  # just deleted
        except Corrupt as exc:
            raise WrongState(
                f"{session.path.name} may need the image: {exc.message}",
                hint=f"delete that VM first (capsem delete {session.path.name}); `capsem image rm --force` does not ask",
            ) from exc
        yield record.id, record.image_digest
