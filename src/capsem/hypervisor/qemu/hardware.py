"""The virtual hardware, as a numbered list. docs/virtual-hardware.md says why each entry is what it is.

A number, once released, never changes its meaning: a checkpoint holds the state of exactly these devices at exactly
these addresses, and can only be restored into the same. Anything that a guest could notice (a device, an address, a
queue count, a CPU feature, the kernel's fixed parameters) therefore makes a new number. What a guest cannot notice
(caches, threads, the sandbox) is decided in command.py and is free to change.

Device strings are QEMU's own (`qemu-system-x86_64 -device NAME,help`). They name their backends: block nodes "root",
"volume" and "bulk", character devices "control" and "console", the random source "entropy".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

BULK_SLOT_BYTES: Final = (
    1 << 40
)  # what the guest sees; fixed, so that the node behind the slot can be exchanged unnoticed


@dataclass(frozen=True, slots=True)
class Hardware:
    """One entry of the list: everything that a guest can notice of its machine, but for size and accelerator."""

    machine: str  # versioned machine type and its options
    cpu: str
    globals: tuple[str, ...]
    devices: tuple[str, ...]
    command_line: str  # what the kernel must know of this hardware; the image's own parameters follow


# x86-64-v3 (https://gitlab.com/x86-psABIs/x86-64-ABI, "micro-architecture levels"): Intel since 2013, AMD since 2017.
# Spelled out on the plainest model rather than by the name of a product line, so that it means the same on Intel and
# AMD hosts, under KVM and under TCG, in every QEMU since 7.2. Beyond the level: rdrand (early entropy), fsgsbase and
# rdtscp (context switches), smep, and xsaveopt, without which QEMU 7.2's TCG takes xsave for absent and the kernel
# loops at its first write to CR4.OSXSAVE. The command line adds `enforce`: no feature is ever dropped silently.
_X86_64_V3 = ",".join(
    (
        "qemu64-v1,svm=off",
        "cx16=on,lahf-lm=on,popcnt=on,pni=on,ssse3=on,sse4.1=on,sse4.2=on",
        "avx=on,avx2=on,bmi1=on,bmi2=on,f16c=on,fma=on,abm=on,movbe=on,xsave=on",
        "aes=on,pclmulqdq=on,rdrand=on,fsgsbase=on,rdtscp=on,smep=on,xsaveopt=on",
    )
)

# A full host disk stops the VM (QMP event BLOCK_IO_ERROR) instead of failing its writes: its file system survives that.
_DISK = "virtio-blk-pci,disable-legacy=on,num-queues=1,queue-size=256,config-wce=off,werror=enospc,rerror=report"
_READ_ONLY = "discard=off,write-zeroes=off"

HARDWARE: Final[Mapping[int, Hardware]] = MappingProxyType(
    {
        1: Hardware(
            machine="pc-q35-7.2,hpet=off,smm=off,vmport=off,usb=off,sata=off,smbus=off,i8042=off",
            cpu=_X86_64_V3,
            globals=(
                "ICH9-LPC.disable_s3=1",  # a guest that sleeps by itself would never be woken
                "ICH9-LPC.disable_s4=1",
            ),
            devices=(
                "virtio-serial-pci,id=ports,addr=0x2,disable-legacy=on,max_ports=4",
                "virtserialport,id=control-port,bus=ports.0,nr=1,chardev=control,name=org.capsem.control",
                f"{_DISK},{_READ_ONLY},id=root-disk,addr=0x3,drive=root,serial=root",
                f"{_DISK},discard=on,write-zeroes=on,write-cache=on,id=volume-disk,addr=0x4,drive=volume,serial=volume",
                f"{_DISK},{_READ_ONLY},id=bulk-disk,addr=0x5,drive=bulk,serial=bulk",
                "virtio-rng-pci,id=rng,addr=0x6,disable-legacy=on,rng=entropy",
                "pvpanic-pci,id=panic,addr=0x7",
                "isa-serial,id=serial,index=0,chardev=console",
            ),
            command_line="console=ttyS0 panic=-1 no_timer_check tsc=reliable",
        ),
    }
)
