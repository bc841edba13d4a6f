"""The command line of QEMU, as a pure function of the machine's specification.

Rules: every channel is a descriptor that is connected before QEMU starts, so no socket has a path and the guest never
sees a port without a peer. Every block node is named and given whole, its backing node included: what an image's
header says of other files is never looked at. Nothing about a single VM goes into the kernel's command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.qemu.hardware import BULK_SLOT_BYTES, HARDWARE, Hardware
from capsem.model.errors import InvalidInput

BINARY: Final = "qemu-system-x86_64"
SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
TOP_NODE: Final = "volume"  # of a machine that starts; each layer added while it runs gets a name of its own
FORMATS: Final = frozenset({"raw", "qcow2"})

# The translation cache, in MiB. A boot to the agent translates into 86 MiB; with 64 it is thrown away once on the way
# (some 5 % of the boot), and QEMU's default of 1024 lets it grow to twice the VM's memory for nothing.
# One thread for all vCPUs: with one each, a guest of four panics now and then on QEMU 7.2 (docs/decisions/0003).
ACCELERATORS: Final = {Accelerator.KVM: "kvm", Accelerator.TCG: "tcg,thread=single,tb-size=128"}


@dataclass(frozen=True, slots=True)
class Channels:
    """QEMU's ends of the three socket pairs: descriptor numbers in the child."""

    qmp: int
    control: int
    console: int


def argv(
    spec: MachineSpec,
    channels: Channels,
    *,
    generation: str,
    binary: str = BINARY,
    incoming: bool = False,
    tsc_khz: int | None = None,
) -> list[str]:
    """The command line that starts `spec` with its vCPUs stopped.

    `generation` is the VM generation id (a UUID), a fresh one for each process: the guest's kernel reseeds its random
    generator when it sees it change. With `incoming`, QEMU waits for `migrate-incoming` with a device state instead of
    beginning at the reset vector. `tsc_khz`: how fast the guest's time stamp counter runs, for a kernel that boots; that is
    the host's, no part of the virtual hardware. Raises InvalidInput.
    """
    virtual = virtual_hardware(spec.hardware)
    if not spec.volume:
        raise InvalidInput("a machine without a volume", hint="give at least one layer")
    for layer in spec.volume:
        if layer.format not in FORMATS:
            raise InvalidInput(f"layer format {layer.format[:20]!r}", hint="use raw or qcow2")
    args = [
        *(binary, "-name", f"{spec.vm_id},debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"),
        *("-sandbox", SANDBOX),
        *("-machine", f"{virtual.machine},memory-backend=ram0,dump-guest-core=off,mem-merge=off"),
        *("-accel", ACCELERATORS[spec.accelerator]),
        *("-cpu", f"{virtual.cpu},enforce"),
        *("-smp", f"cpus={spec.cpus},maxcpus={spec.cpus},sockets=1,cores={spec.cpus},threads=1"),
        *("-m", f"{spec.ram_mb}M"),
        *("-rtc", "base=utc,clock=host"),
        *("-object", _json(ram_object(spec))),
        *("-object", _json({"qom-type": "rng-builtin", "id": "entropy"})),
    ]
    for name, fd in (("qmp", channels.qmp), ("control", channels.control), ("console", channels.console)):
        args += ["-chardev", f"socket,id={name},fd={fd}"]
    args += ["-mon", "chardev=qmp,mode=control"]
    for node in block_nodes(spec):
        args += ["-blockdev", _json(node)]
    for each in virtual.globals:
        args += ["-global", each]
    for each in (*virtual.devices, f"vmgenid,id=generation,guid={generation}"):
        args += ["-device", each]
    args += ["-kernel", str(spec.kernel), "-initrd", str(spec.initrd)]
    parameters = [virtual.command_line, spec.command_line, f"tsc_early_khz={tsc_khz}" if tsc_khz else ""]
    args += ["-append", " ".join(filter(None, parameters))]
    if incoming:
        # Device states are written without the configuration section that `migrate` would put before them.
        args += ["-global", "migration.send-configuration=off", "-incoming", "defer"]
    return args


def virtual_hardware(number: int) -> Hardware:
    """The entry of the list. Raises InvalidInput."""
    try:
        return HARDWARE[number]
    except KeyError:
        raise InvalidInput(
            f"virtual hardware number {number} is not known to this version",
            hint="upgrade Capsem, or start the VM cold from its disk",
        ) from None


def ram_object(spec: MachineSpec) -> dict[str, Any]:
    """Guest memory: a private mapping, so that the file is never written and may be shared by any number of machines."""
    return {
        "qom-type": "memory-backend-file",
        "id": "ram0",
        "size": spec.ram_mb << 20,
        "mem-path": str(spec.ram_file),
        "share": False,
        "prealloc": False,
        "merge": False,
        "dump": False,
        "discard-data": False,  # never punch holes into the file, not even at exit
    }


def block_nodes(spec: MachineSpec) -> Iterator[dict[str, Any]]:
    """The block graph, in the order of its construction: image, volume layers base first, the empty bulk slot."""
    yield _file("root-file", str(spec.root), writable=False)
    yield {"driver": "raw", "node-name": "root", "file": "root-file", "read-only": True, "auto-read-only": False}
    yield from _volume(spec.volume)
    yield {
        "driver": "null-co",
        "node-name": "bulk",
        "size": BULK_SLOT_BYTES,
        "read-zeroes": True,
        "read-only": True,
        "auto-read-only": False,
    }


def _volume(layers: Sequence[Layer]) -> Iterator[dict[str, Any]]:
    """The chain: nodes named by their place, 0 being the base, but for the top, which is "volume"."""
    backing: str | None = None
    for place, layer in enumerate(layers):
        if layer.format == "raw" and backing is not None:
            raise InvalidInput(
                f"a raw layer above another one: {layer.path}", hint="only the base of a volume may be raw"
            )
        top = place == len(layers) - 1
        name = TOP_NODE if top else f"volume-{place}"
        yield from layer_nodes(layer, place, name=name, backing=backing, top=top)
        backing = name


def layer_nodes(
    layer: Layer, place: int, *, name: str, backing: str | None, top: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two nodes of a layer: its file, and above it the node `name` that reads the layer's format."""
    node: dict[str, Any] = {
        "driver": layer.format,
        "node-name": name,
        "file": f"volume-{place}-file",
        "read-only": not top,
        "auto-read-only": False,
    }
    if layer.format == "qcow2":
        node["backing"] = backing  # null at the base: left out, QEMU would follow a name in the header
    if top:
        node |= {"discard": "unmap", "detect-zeroes": "unmap"}
    return _file(f"volume-{place}-file", str(layer.path), writable=top), node


def _file(name: str, path: str, *, writable: bool) -> dict[str, Any]:
    return {
        "driver": "file",
        "node-name": name,
        "filename": path,
        "read-only": not writable,
        "auto-read-only": False,
        "locking": "on",
        "aio": "threads",  # io_uring is switched off on many hosts, and its gain is lost behind one queue
        "cache": {"direct": False, "no-flush": False},
        "discard": "unmap",
    }


def _json(value: dict[str, Any]) -> str:
    """QEMU's JSON form of an option: no quoting rules of its own, so a path may hold commas."""
    return json.dumps(value, separators=(",", ":"))
