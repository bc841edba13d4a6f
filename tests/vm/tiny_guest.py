"""A guest of 104 bytes that stands for a kernel: starts in no time, does what it is told over the serial line.

It says "R" when it is ready. "q" powers off, "x" resets, "p" panics; any other byte is counted in RAM and answered with
the count as a digit. As QEMU's `-kernel` it is an ELF file with a PVH entry note, like an unpacked Linux kernel.
Sources: Xen's public/elfnote.h (note 18, PHYS32_ENTRY), QEMU's docs/specs/pvpanic.rst, ACPI 4.8.3.2 (PM1 control).
"""

from __future__ import annotations

import struct
from pathlib import Path

LISTING = """
                            .code32
                            start:
0000  c7050000200000000000    movl $0, 0x200000               ; the counter, in RAM
000a  66baf803                mov $0x3f8, %dx
000e  b052                    mov $'R', %al                   ; ready
0010  ee                      out %al, %dx
                            poll:
0011  66bafd03                mov $0x3fd, %dx                 ; line status: a byte has come?
0015  ec                      in %dx, %al
0016  a801                    test $1, %al
0018  7504                    jnz got
001a  f390                    pause
001c  ebf3                    jmp poll
                            got:
001e  66baf803                mov $0x3f8, %dx
0022  ec                      in %dx, %al
0023  3c71                    cmp $'q', %al
0025  7418                    je off
0027  3c78                    cmp $'x', %al
0029  741f                    je reset
002b  3c70                    cmp $'p', %al
002d  7423                    je panic
002f  ff0500002000            incl 0x200000                   ; anything else: count, and answer with the count
0035  a000002000              mov 0x200000, %al
003a  0430                    add $'0', %al
003c  ee                      out %al, %dx
003d  ebd2                    jmp poll
                            off:
003f  66ba0406                mov $0x604, %dx                 ; ACPI PM1a control: sleep type 0 (S5 on q35), enable
0043  66b80020                mov $0x2000, %ax
0047  66ef                    out %ax, %dx
0049  f4                      hlt
                            reset:
004a  66baf90c                mov $0xcf9, %dx                 ; the chip set's reset control
004e  b006                    mov $6, %al
0050  ee                      out %al, %dx
0051  f4                      hlt
                            panic:
0052  66baf80c                mov $0xcf8, %dx                 ; PCI configuration: device 7, BAR 0
0056  b810380080              mov $0x80003810, %eax
005b  ef                      out %eax, %dx
005c  66bafc0c                mov $0xcfc, %dx
0060  ed                      in %dx, %eax
0061  83e0f0                  and $0xfffffff0, %eax
0064  c60001                  movb $1, (%eax)                 ; pvpanic: panicked
0067  f4                      hlt
"""

LOAD_ADDRESS = 0x100000


def code() -> bytes:
    """The bytes of the listing."""
    return b"".join(bytes.fromhex(line.split()[1]) for line in LISTING.splitlines() if line[:4].strip())


def elf() -> bytes:
    """A 32-bit ELF file: header, two program headers (load, note), the note, the code."""
    text = code()
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", LOAD_ADDRESS)
    headers = 52 + 2 * 32
    ident = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, LOAD_ADDRESS, 52, 0, 0, 52, 32, 2, 0, 0, 0)
    at = headers + len(note)
    load = struct.pack("<IIIIIIII", 1, at, LOAD_ADDRESS, LOAD_ADDRESS, len(text), len(text), 7, 1)
    notes = struct.pack("<IIIIIIII", 4, headers, 0, 0, len(note), len(note), 4, 4)
    return header + load + notes + note + text


def write(directory: Path) -> Path:
    """Write the guest; returns its path."""
    path = directory / "tiny-guest"
    path.write_bytes(elf())
    return path
