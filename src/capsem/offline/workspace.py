"""The workspace of a VM that does not run: the same answers as its agent would give, from its volume."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

from capsem.model.errors import GuestFailed, InvalidInput, NotFound, PermissionDenied
from capsem.offline.ext4 import ROOT, FileSystem, Inode, Read

GUEST_PATH: Final = "/root"  # where the guest sees it
_DIRECTORY: Final = "workspace"  # on the volume
_MOST_SEEN: Final = 200_000  # directory entries in one listing, shown or not
_MOST_LINKS: Final = 40  # as Linux has it
_MOST_ENTRIES: Final = 50_000  # of one listing, as of the agent's
_MOST_STEPS: Final = 1000  # components of a path, those of links included


class File(NamedTuple):
    """A regular file, ready to be read."""

    size: int
    mode: int
    content: Iterator[bytes]


class Workspace:
    """Files and directories below the workspace. Paths are relative to it, without "..", as `clean_path` leaves them.

    Every method raises NotFound, PermissionDenied (a link leads out), GuestFailed (the file system makes no sense, a
    link goes in circles), and OSError.
    """

    def __init__(self, read: Read) -> None:
        """`read(offset, size)` returns bytes of the volume. Raises Corrupt."""
        self._fs = FileSystem(read)
        top = self._child(self._fs.inode(ROOT), _DIRECTORY)
        if top is None or not top.is_directory:
            raise GuestFailed("the VM has no workspace on its volume", hint="it has never been started, or removed it")
        self._top = top

    def _child(self, directory: Inode, name: str) -> Inode | None:
        for each, number in self._fs.entries(directory):
            if each == name:
                return self._fs.inode(number)
        return None

    def _find(self, path: str) -> Inode:
        """The inode at `path`; links on the way are followed as long as they stay inside, the last one never is."""
        outside = PermissionDenied(f"{path}: outside of {GUEST_PATH}", hint=f"use a path inside {GUEST_PATH}")
        missing = NotFound(f"{path}: no such file or directory")
        pending = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        trail = [self._top]
        links = steps = 0
        while pending:
            part = pending.pop()
            steps += 1
            if part == "..":
                if len(trail) == 1:
                    raise outside
                trail.pop()
                continue
            found = self._child(trail[-1], part)
            if found is None:
                raise missing
            if found.is_link and pending:
                links += 1
                target = self._fs.target(found)
                if links > _MOST_LINKS or steps > _MOST_STEPS:
                    raise GuestFailed(f"{path}: too many levels of symbolic links")
                if target.startswith("/"):
                    if target != GUEST_PATH and not target.startswith(GUEST_PATH + "/"):
                        raise outside
                    target, trail = target[len(GUEST_PATH) :], [self._top]
                pending += [step for step in reversed(target.split("/")) if step not in ("", ".")]
            elif found.is_link:
                raise PermissionDenied(f"{path}: is a symbolic link")
            elif found.is_directory:
                trail.append(found)
            elif pending:
                raise missing
            else:
                return found
        return trail[-1]

    def open(self, path: str) -> File:
        """A regular file; also raises InvalidInput when it is none."""
        inode = self._find(path)
        if not inode.is_file:
            raise InvalidInput(f"{path}: not a regular file")
        return File(inode.size, stat.S_IMODE(inode.mode), self._fs.content(inode))

    def list(self, path: str, depth: int) -> tuple[list[tuple[str, str, int, int]], bool]:
        """What `wire.messages.ListDir` describes, and whether it had to be cut short."""
        top = self._find(path)
        if not top.is_directory:
            raise InvalidInput(f"{path}: not a directory")
        found: list[tuple[str, str, int, int]] = []
        pending = [(top, "", depth)]
        seen = 0
        while pending:
            directory, prefix, levels = pending.pop()
            for name, number in self._fs.entries(directory):
                seen += 1
                if len(found) >= _MOST_ENTRIES or seen > _MOST_SEEN:
                    return found, True
                inode = self._fs.inode(number)
                # A name that is no text could not be told in JSON, nor asked for.
                shown = prefix + name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                if inode.is_file:
                    found.append((shown, "file", inode.size, inode.mtime))
                elif inode.is_directory:
                    found.append((shown, "directory", 0, inode.mtime))
                    if levels > 1:
                        pending.append((inode, shown + "/", levels - 1))
        return found, False
