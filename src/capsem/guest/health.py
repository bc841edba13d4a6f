"""Is this machine well after it was restored? A claim to verify, not a return code.

Before a checkpoint a mark is left on the volume and kept in memory: what comes back together must carry the same one.
The mark on the volume is read around the page cache, which was restored with the memory and would only say what memory
says. Then the volume must take a write and flush it, and the kernel must have had nothing to complain about. A volume
that is merely full is as well as its owner wants it.
"""

from __future__ import annotations

import mmap
import os

MARK = ".capsem-mark"  # on the volume, made with it: one that its owner has filled has no room for another file
BLOCK = 4096  # bytes of the mark
_LINES = 8
# Of the kernel's complaints, those that mean that the volume or its file system is not what the memory believes.
_FATAL = (
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs (",
    "Aborting journal",
    "JBD2",
    "Remounting filesystem read-only",
    "failed to convert unwritten extents",
    "virtio_blk",
)
_FULL = 28  # ENOSPC
_ERROR = 3  # syslog(2): levels up to "error"


class Health:
    """Of the volume mounted at a path; "": there is none (tests), and nothing to examine."""

    def __init__(self, volume: str) -> None:
        self._path = f"{volume}/{MARK}" if volume else ""
        self._fd = -1
        self._block = mmap.mmap(-1, BLOCK)  # direct I/O wants aligned memory
        self._mark = ""
        self._log = -1

    def sync(self, mark: str | None) -> None:
        """Leave the mark, if there is one, and flush every file system. Raises OSError."""
        try:
            if mark and self._path:
                self._open()
                self._write(mark)
                self._mark = mark
        finally:
            self._follow_log()
            os.sync()
        if self._fd >= 0:
            os.fsync(self._fd)  # there is nothing left to flush: this says whether all of it was

    def examine(self, mark: str | None) -> tuple[list[str], list[str]]:
        """What is wrong, and what else the kernel complained of since the last `sync`.

        A volume that is not well may keep this from ever returning; who asks has a limit. It uses what `sync` has opened:
        in a machine that was just restored every system call of another kind is felt.
        """
        problems: list[str] = []
        warnings: list[str] = []
        if self._path:
            try:
                if self._fd < 0:
                    self._open()
                if mark is not None:
                    found = self._read()
                    if not mark == self._mark == found:
                        problems.append(
                            f"memory and volume are not of one checkpoint: "
                            f"expected {mark[:12]}, memory has {self._mark[:12] or 'none'}, volume {found[:12] or 'none'}"
                        )
                self._write(mark or "resumed")
                os.fsync(self._fd)
            except OSError as error:
                if mark is None and error.errno == _FULL:
                    warnings.append("the volume is full: it could not be tried whether it can be written")
                else:
                    problems.append(f"the volume cannot be written: {error}")
        complaints = self._complaints()
        problems += [line for line in complaints if any(sign in line for sign in _FATAL)]
        warnings += [line for line in complaints if line not in problems]
        if self._path and self._log < 0:
            warnings.insert(0, "the kernel's log was not followed: what it complained of is not known")
        return problems[:_LINES], warnings[:_LINES]

    def _open(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def _write(self, mark: str) -> None:
        self._block[:] = mark.encode("ascii").ljust(BLOCK, b"\0")
        os.pwrite(self._fd, self._block, 0)

    def _read(self) -> str:
        """The mark as the disk has it."""
        self._block[:] = bytes(BLOCK)  # what a shorter read leaves is not the last mark
        os.preadv(self._fd, [self._block], 0)
        return self._block[:].rstrip(b"\0").decode("ascii", "replace")

    def _follow_log(self) -> None:
        """From here on, `_complaints` tells what comes."""
        try:
            if self._log < 0:
                self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._log, 0, os.SEEK_END)
        except OSError:  # an unprivileged agent in tests
            pass

    def _complaints(self) -> list[str]:
        lines = []
        while self._log >= 0:
            try:
                record = os.read(self._log, 8192).decode("utf-8", "replace")
            except BlockingIOError:
                break
            except BrokenPipeError:  # records were overwritten before we read them
                continue
            head, _, text = record.partition(";")
            level = head.split(",", 1)[0]
            if level.isdigit() and int(level) & 7 <= _ERROR:
                lines.append(text.split("\n", 1)[0][:200])
        return lines
