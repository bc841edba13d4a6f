"""The guest of the acceleration probe: 400 bytes of machine code that go where a kernel goes.

From the reset vector through real and protected mode into long mode with paging, touch fresh memory, count for a
while, sleep until a timer's interrupt, and leave through QEMU's debug exit. On the way it reports each stage with one
letter on the debug console.

The counting is the point. There are hosts where KVM opens and runs every single instruction correctly, but by the
kernel's instruction interpreter (seen: PVM inside a cloud VM, 1.2 million instructions a second); a guest that only
switches modes passes there in a tenth of a second, and Debian's kernel never comes to its first line. 2^24 rounds are
some 10 ms of a processor, 0.1 s of TCG, and half a minute of that.

The listing is the program: offset, bytes, instruction (GNU assembler syntax), comment. tests/unit checks its inner
consistency, tests/vm that it passes under TCG. Sources: Intel SDM volume 3, "Mode Switching", "4-Level Paging", "APIC
Timer"; QEMU's hw/misc/debugexit.c and hw/char/debugcon.c.
"""

from __future__ import annotations

from typing import Final

ROM_BYTES: Final = 0x10000  # QEMU maps it below 1 MiB and below 4 GiB; its last 16 bytes hold the reset vector
EXIT_PORT: Final = 0xF4
REPORT_PORT: Final = 0xE9
PASSED: Final = 2 * 0x2A + 1  # QEMU's exit status after the guest has written 0x2a to the exit port

# What a guest that sent this letter last is doing.
STAGES: Final = {
    "": "at its first instruction",
    "R": "entering protected mode",
    "P": "entering long mode",
    "L": "counting in long mode",
    "C": "waiting for a timer interrupt",
    "I": "leaving",
}

LISTING: Final = """
                                .code16
                                start:
0000  fa                           cli                              ; no interrupts until the table for them is there
0001  b052                         mov $'R', %al                    ; report: real mode
0003  e6e9                         out %al, $0xe9
0005  2e660f01169801               lgdtl %cs:(gdtr - base)          ; the descriptor table at the end of this code
000c  0f20c0                       mov %cr0, %eax
000f  0c01                         or $1, %al                       ; CR0.PE: protected mode
0011  0f22c0                       mov %eax, %cr0
0014  66ea1c000f000800             ljmpl $8, $(0xf0000 + prot - base)
                                .code32
                                prot:
001c  b050                         mov $'P', %al                    ; report: protected mode
001e  e6e9                         out %al, $0xe9
0020  b810000000                   mov $0x10, %eax
0025  8ed8                         mov %eax, %ds
0027  8ec0                         mov %eax, %es
0029  8ed0                         mov %eax, %ss
002b  bc00700000                   mov $0x7000, %esp
0030  fc                           cld
0031  31c0                         xor %eax, %eax                   ; clear 0x1000..0x7fff for page tables and interrupt table
0033  bf00100000                   mov $0x1000, %edi
0038  b9001c0000                   mov $0x1c00, %ecx
003d  f3ab                         rep stosl
003f  c7050010000003200000         movl $0x2003, 0x1000             ; PML4[0] -> PDPT at 0x2000
0049  c7050020000003300000         movl $0x3003, 0x2000             ; PDPT[0] -> page directory at 0x3000: the first GiB
0053  c7051820000003400000         movl $0x4003, 0x2018             ; PDPT[3] -> page directory at 0x4000: the fourth GiB
005d  bf00300000                   mov $0x3000, %edi
0062  b883000000                   mov $0x83, %eax
0067  8907                      1: mov %eax, (%edi)                 ; 512 pages of 2 MiB, mapped one to one
0069  0500002000                   add $0x200000, %eax
006e  83c708                       add $8, %edi
0071  81ff00400000                 cmp $0x4000, %edi
0077  72ee                         jb 1b
0079  c705b84f00009300e0fe         movl $0xfee00093, 0x4fb8         ; the local APIC's page, uncached
0083  31c0                         xor %eax, %eax
0085  0fa2                         cpuid                            ; as every kernel does: exits to the hypervisor
0087  0f20e0                       mov %cr4, %eax
008a  83c820                       or $0x20, %eax                   ; CR4.PAE
008d  0f22e0                       mov %eax, %cr4
0090  b800100000                   mov $0x1000, %eax
0095  0f22d8                       mov %eax, %cr3
0098  b9800000c0                   mov $0xc0000080, %ecx            ; EFER
009d  0f32                         rdmsr
009f  0d00010000                   or $0x100, %eax                  ; EFER.LME
00a4  0f30                         wrmsr
00a6  0f20c0                       mov %cr0, %eax
00a9  0d00000080                   or $0x80000000, %eax             ; CR0.PG: long mode is on
00ae  0f22c0                       mov %eax, %cr0
00b1  eab8000f001800               ljmpl $0x18, $(0xf0000 + long - base)
                                .code64
                                long:
00b8  b04c                         mov $'L', %al                    ; report: long mode
00ba  e6e9                         out %al, $0xe9
00bc  bf00001000                   mov $0x100000, %edi              ; touch 1 MiB of fresh memory, a page at a time
00c1  893f                      2: mov %edi, (%rdi)
00c3  81c700100000                 add $0x1000, %edi
00c9  81ff00002000                 cmp $0x200000, %edi
00cf  72f0                         jb 2b
00d1  b900000001                   mov $0x1000000, %ecx             ; count to 2^24
00d6  ffc9                      3: dec %ecx
00d8  75fc                         jnz 3b
00da  b043                         mov $'C', %al                    ; report: counted
00dc  e6e9                         out %al, $0xe9
00de  488d0584000000               lea handler(%rip), %rax          ; interrupt gate 0x20 of the table at 0x5000
00e5  6689042500520000             mov %ax, 0x5200
00ed  66c70425025200001800         movw $0x18, 0x5202
00f7  66c7042504520000008e         movw $0x8e00, 0x5204
0101  c1e810                       shr $16, %eax
0104  6689042506520000             mov %ax, 0x5206
010c  66c70425006000000f02         movw $0x20f, 0x6000              ; the table's limit and address
0116  c704250260000000500000       movl $0x5000, 0x6002
0121  0f011c2500600000             lidt 0x6000
0129  be0000e0fe                   mov $0xfee00000, %esi            ; the local APIC
012e  c786f0000000ff010000         movl $0x1ff, 0xf0(%rsi)          ; enable it
0138  c786e00300000b000000         movl $0xb, 0x3e0(%rsi)           ; timer divider 1
0142  c7862003000020000000         movl $0x20, 0x320(%rsi)          ; timer: one shot, vector 0x20
014c  c7868003000000000100         movl $0x10000, 0x380(%rsi)       ; go
0156  31db                         xor %ebx, %ebx
0158  fb                        4: sti
0159  f4                           hlt                              ; sleep until the timer's interrupt
015a  85db                         test %ebx, %ebx
015c  74fa                         jz 4b
015e  b049                         mov $'I', %al                    ; report: interrupted
0160  e6e9                         out %al, $0xe9
0162  b02a                         mov $0x2a, %al                   ; done: isa-debug-exit ends QEMU with status 2 * 0x2a + 1
0164  e6f4                         out %al, $0xf4
0166  f4                        5: hlt
0167  ebfd                         jmp 5b
                                handler:
0169  ffc3                         inc %ebx
016b  c786b000000000000000         movl $0, 0xb0(%rsi)              ; end of interrupt
0175  48cf                         iretq
0177  90                           (padding)
                                gdt:
0178  0000000000000000             .quad 0
0180  ffff0000009bcf00             .quad 0x00cf9b000000ffff
0188  ffff00000093cf00             .quad 0x00cf93000000ffff
0190  ffff0000009baf00             .quad 0x00af9b000000ffff
                                gdtr:
0198  1f00                         .word 31
019a  78010f00                     .long 0xf0000 + gdt - base
"""

RESET: Final = bytes.fromhex("ea000000f0")  # ljmpw $0xf000, $0: to the start of the ROM


def code() -> bytes:
    """The bytes of the listing."""
    fields = (line.split() for line in LISTING.splitlines() if line[:4].strip())
    return b"".join(bytes.fromhex(data) for _, data, *_ in fields)


def rom() -> bytes:
    """The firmware image to start QEMU with."""
    text = code()
    return text.ljust(ROM_BYTES - 16, b"\xf4") + RESET.ljust(16, b"\xf4")
