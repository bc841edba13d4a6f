"""This process itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# Fields 48 and 49 of proc_pid_stat(5), counted after the command's last ")".
_ARG_START: Final = 45
_ARG_END: Final = 46


def set_process_name(name: str) -> None:
    """Set the name that process listings show (15 bytes at most); a script's is otherwise its interpreter's."""
    Path("/proc/self/comm").write_text(name, encoding="ascii")


def command_line() -> list[bytes]:
    """The arguments of this process, interpreter included, as process listings show them."""
    return Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]


def set_command_line(arguments: Sequence[bytes]) -> None:
    """Show other arguments in process listings. They are written over those that the kernel has put into our memory: a
    process that will want more starts with that much room. Where there is too little, nothing is changed.
    """
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    text = b"".join(each + b"\0" for each in arguments)
    if len(text) >= end - start:
        return
    fd = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, text.ljust(end - start, b"\0"), start)
    finally:
        os.close(fd)
