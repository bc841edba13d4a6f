"""How fast this host's time stamp counter runs, for guests that are emulated.

QEMU's emulator hands the host's counter on as it is (`cpu_get_host_ticks`), and says nowhere how fast that is. A kernel
that has to find out compares it with emulated timers while it boots, and trusts the worse of them: on a busy host it
may come out at a quarter of what it is, and that guest's clock, with all its forks', runs four times too fast. So it is
measured here, against the clock of this host's kernel, and told to the guest's.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from typing import Final

SPAN: Final = 0.02  # seconds: two readings that are each right to a microsecond tell the rate to one part in 10,000
TRIES: Final = 5  # readings at each end: one that was interrupted is not taken
# Intel SDM vol. 2, RDTSC: rdtsc; shl rdx, 32; or rax, rdx; ret
_READ: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")


def frequency_khz() -> int | None:
    """Thousands of ticks a second; takes SPAN, and blocks. None on a host that does not let its counter be read so."""
    if platform.machine() != "x86_64":
        return None
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # a policy of the host's: memory is writable or executable
        return None
    code.write(_READ)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def reading() -> tuple[int, int]:
        """The counter, and twice the time in nanoseconds at that instant."""
        found = []
        for _ in range(TRIES):
            before = time.monotonic_ns()
            ticks = read()
            after = time.monotonic_ns()
            found.append((after - before, ticks, before + after))
        return min(found)[1:]

    first_ticks, first_time = reading()
    time.sleep(SPAN)
    last_ticks, last_time = reading()
    return round((last_ticks - first_ticks) * 2_000_000 / (last_time - first_time))
