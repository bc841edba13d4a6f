"""Which pages of a private file mapping a process has written to.

A page of it that is present (or swapped out) and no longer the file's is exactly a page that was written to since the
mapping was made (https://www.kernel.org/doc/html/latest/admin-guide/mm/pagemap.html). Linux 6.7 and later tell the runs of
such pages by ioctl PAGEMAP_SCAN, in a time that follows what is mapped; an older one has its entry read for every page
there is, 8 bytes each: of 4 GiB that took 17 ms where the ioctl took 1.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import re
import struct
from pathlib import Path
from typing import Final

from capsem.store.ram import PAGE, Runs

_ENTRY: Final = 8  # bytes of pagemap for each page
_READ: Final = 8 << 20  # bytes of pagemap read at once: 4 GiB of memory
# The top byte of an entry: present or swapped, and not of a file (bits 63, 62, 61); the five bits below say other things.
_CHANGED: Final = re.compile(rb"[\x40-\x5f\x80-\x9f\xc0-\xdf]+")

# linux/fs.h
_PAGEMAP_SCAN: Final = 0xC0606610
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4
# struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, and four masks of categories: taken as
# their opposite, of which all are wanted, of which one is wanted, told of each.
_ARGUMENT: Final = struct.Struct("=12Q")
_MASKS: Final = (_FILE, _FILE, _PRESENT | _SWAPPED, _FILE)
_REGION: Final = 3  # numbers of struct page_region: start, end, categories
_REGIONS: Final = 8192  # taken at a time


def changed(pid: int, start: int, size: int) -> Runs:
    """What process `pid` has written to of its private mapping of a file at `start`, `size` bytes long, as (offset, length),
    ascending and with something between any two. Raises OSError."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        try:
            return scan(pagemap.fileno(), start, size)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
        return read(pagemap.fileno(), start, size)


def scan(pagemap: int, start: int, size: int) -> Runs:
    """The same, as the kernel tells it. Raises OSError; ENOTTY: it does not."""
    runs: Runs = []
    regions = array.array("Q", bytes(_REGIONS * _REGION * 8))
    at, end = start, start + size
    while True:
        where, _ = regions.buffer_info()
        argument = _ARGUMENT.pack(_ARGUMENT.size, 0, at, end, 0, where, _REGIONS, 0, *_MASKS)
        found = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(argument))
        for number in range(0, found * _REGION, _REGION):
            _append(runs, regions[number] - start, regions[number + 1] - regions[number])
        # Not the `walk_end` it answers with, which 6.18 leaves behind where it has looked further in the same call.
        if found < _REGIONS:
            _entries(pagemap, start, 1)  # of a process that has ended the scan finds nothing, and does not say why
            return runs
        at = regions[(found - 1) * _REGION + 1]


def read(pagemap: int, start: int, size: int) -> Runs:
    """The same, from every page's entry. Raises OSError."""
    runs: Runs = []
    for base in range(0, size, _READ // _ENTRY * PAGE):
        pages = min(_READ // _ENTRY, (size - base) // PAGE)
        entries = _entries(pagemap, start + base, pages)
        for found in _CHANGED.finditer(entries[_ENTRY - 1 :: _ENTRY]):
            _append(runs, base + found.start() * PAGE, (found.end() - found.start()) * PAGE)
    return runs


def _entries(pagemap: int, start: int, pages: int) -> bytes:
    entries = os.pread(pagemap, pages * _ENTRY, start // PAGE * _ENTRY)
    if len(entries) != pages * _ENTRY:
        raise OSError("the page map of the process ends early: it has ended")
    return entries


def _append(runs: Runs, offset: int, length: int) -> None:
    if runs and sum(runs[-1]) == offset:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((offset, length))
