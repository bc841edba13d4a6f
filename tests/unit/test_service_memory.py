"""What the kernel says of memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

from capsem.service.memory import host_memory, process_memory


def test_the_hosts() -> None:
    memory = host_memory()
    assert 0 < memory.available <= memory.total
    assert memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_process_counts_what_it_has_touched() -> None:
    before = process_memory([os.getpid()])
    with mmap.mmap(-1, 64 << 20) as memory:
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1
        assert process_memory([os.getpid()]) - before >= 60 << 20


def test_one_that_is_gone_takes_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_memory([process.pid]) == 0
