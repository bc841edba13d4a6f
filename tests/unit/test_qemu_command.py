"""The command line, as a function."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.qemu.command import SANDBOX, Channels, argv
from capsem.hypervisor.qemu.hardware import HARDWARE
from capsem.model.errors import InvalidInput

SPEC = MachineSpec(
    vm_id="box",
    cpus=2,
    ram_mb=512,
    accelerator=Accelerator.TCG,
    kernel=Path("/i/vmlinux"),
    initrd=Path("/i/initrd"),
    root=Path("/i/root.erofs"),
    volume=(
        Layer(Path("/i/volume.img"), "raw"),
        Layer(Path("/s/a,b.qcow2"), "qcow2"),
        Layer(Path("/s/c.qcow2"), "qcow2"),
    ),
    ram_file=Path("/s/ram,512"),
    command_line="ro quiet",
)
CHANNELS = Channels(qmp=7, control=8, console=9)
GENERATION = "11111111-2222-3333-4444-555555555555"


def line(spec: MachineSpec = SPEC, *, incoming: bool = False) -> list[str]:
    return argv(spec, CHANNELS, generation=GENERATION, incoming=incoming)


def values(args: list[str], option: str) -> list[str]:
    return [args[place + 1] for place, each in enumerate(args) if each == option]


def nodes(spec: MachineSpec = SPEC) -> dict[str, dict[str, Any]]:
    return {node["node-name"]: node for node in map(json.loads, values(line(spec), "-blockdev"))}


def test_machine_accelerator_and_cpu() -> None:
    args = line()
    assert values(args, "-machine")[0].startswith("pc-q35-7.2,")
    assert "memory-backend=ram0" in values(args, "-machine")[0]
    assert values(args, "-accel") == ["tcg,thread=single,tb-size=128"]
    assert values(line(replace(SPEC, accelerator=Accelerator.KVM)), "-accel") == ["kvm"]
    assert values(args, "-cpu")[0].endswith(",enforce")
    assert values(args, "-smp") == ["cpus=2,maxcpus=2,sockets=1,cores=2,threads=1"]
    assert values(args, "-m") == ["512M"]


def test_the_same_hardware_under_both_accelerators() -> None:
    tcg, kvm = line(), line(replace(SPEC, accelerator=Accelerator.KVM))
    assert [(a, b) for a, b in zip(tcg, kvm, strict=True) if a != b] == [("tcg,thread=single,tb-size=128", "kvm")]


def test_a_kernel_that_boots_is_told_how_fast_its_counter_runs() -> None:
    assert values(line(), "-append") == ["console=ttyS0 panic=-1 no_timer_check tsc=reliable ro quiet"]
    (told,) = values(argv(SPEC, CHANNELS, generation=GENERATION, tsc_khz=2_596_123), "-append")
    assert told == "console=ttyS0 panic=-1 no_timer_check tsc=reliable ro quiet tsc_early_khz=2596123"


def test_memory_is_a_private_mapping() -> None:
    ram = next(each for each in map(json.loads, values(line(), "-object")) if each["id"] == "ram0")
    assert ram["mem-path"] == "/s/ram,512"
    assert ram["size"] == 512 << 20
    assert ram["share"] is False
    assert ram["prealloc"] is False
    assert ram["discard-data"] is False


def test_confinement() -> None:
    args = line()
    assert values(args, "-sandbox") == [SANDBOX]
    for flag in ("-S", "-nodefaults", "-no-user-config", "-no-reboot"):
        assert flag in args
    assert values(args, "-display") == ["none"]
    words = " ".join(args).lower()
    for never in (
        "netdev",
        "virtio-net",
        "balloon",
        "free-page-reporting",
        "virtio-mem",
        "path=",
        "usb=on",
        "server=on",
    ):
        assert never not in words
    assert "-netdev" not in args
    assert "-nic" not in args


def test_channels_are_descriptors() -> None:
    assert values(line(), "-chardev") == ["socket,id=qmp,fd=7", "socket,id=control,fd=8", "socket,id=console,fd=9"]


def test_the_chain_is_given_whole() -> None:
    graph = nodes()
    assert graph["volume"] == {
        "driver": "qcow2",
        "node-name": "volume",
        "file": "volume-2-file",
        "backing": "volume-1",
        "read-only": False,
        "auto-read-only": False,
        "discard": "unmap",
        "detect-zeroes": "unmap",
    }
    assert graph["volume-1"]["backing"] == "volume-0"
    assert graph["volume-1-file"]["filename"] == "/s/a,b.qcow2"
    assert graph["volume-0"]["driver"] == "raw"
    assert "backing" not in graph["volume-0"]
    writable = {name for name, node in graph.items() if not node["read-only"]}
    assert writable == {"volume", "volume-2-file"}
    assert all(node["auto-read-only"] is False for node in graph.values())
    assert all(node["locking"] == "on" for node in graph.values() if node["driver"] == "file")


def test_a_qcow2_base_has_no_backing_whatever_its_header_says() -> None:
    graph = nodes(replace(SPEC, volume=(Layer(Path("/s/x"), "qcow2"),)))
    assert graph["volume"]["backing"] is None


def test_every_node_is_defined_before_it_is_used() -> None:
    known: set[str] = set()
    for node in map(json.loads, values(line(), "-blockdev")):
        for key in ("file", "backing"):
            assert node.get(key) is None or node[key] in known
        known.add(node["node-name"])


def test_nothing_of_the_vm_is_on_the_kernels_command_line() -> None:
    other = replace(SPEC, vm_id="other", ram_file=Path("/x"), volume=SPEC.volume[:1])
    assert values(line(), "-append") == values(line(other), "-append")
    assert values(line(), "-append")[0].endswith(" ro quiet")
    assert values(line(replace(SPEC, command_line="")), "-append") == [HARDWARE[1].command_line]


def test_restoring_differs_only_in_its_last_words() -> None:
    assert line(incoming=True) == [*line(), "-global", "migration.send-configuration=off", "-incoming", "defer"]


@pytest.mark.parametrize(
    "bad",
    [
        replace(SPEC, hardware=999),
        replace(SPEC, volume=()),
        replace(SPEC, volume=(Layer(Path("/s/x"), "vmdk"),)),
        replace(SPEC, volume=(SPEC.volume[1], SPEC.volume[0])),
    ],
)
def test_refusals_come_with_a_hint(bad: MachineSpec) -> None:
    with pytest.raises(InvalidInput) as caught:
        line(bad)
    assert caught.value.hint


def test_every_device_has_a_place_of_its_own() -> None:
    for hardware in HARDWARE.values():
        pci = [each for each in hardware.devices if "-pci," in each]
        places = [word for each in pci for word in each.split(",") if word.startswith("addr=")]
        assert len(places) == len(set(places)) == len(pci)
        assert all("id=" in each for each in hardware.devices)


def test_released_hardware_never_changes() -> None:
    """Checkpoints depend on it. A change makes a new number: add an entry to HARDWARE, and its digest here.

    (Until a release has been made, number 1 may still change: with its digest.)
    """
    released = {1: "3d3408984a9fb573"}
    digests = {number: hashlib.sha256(repr(entry).encode()).hexdigest()[:16] for number, entry in HARDWARE.items()}
    assert digests == released
