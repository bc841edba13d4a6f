"""Chains that QEMU wrote, read without it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from capsem.hypervisor.driver import Layer
from capsem.hypervisor.qemu.chain import Chain
from capsem.hypervisor.qemu.qcow2 import CLUSTER, create_layer
from capsem.model.errors import Corrupt

SIZE = 1024 << 20
SPOTS = (0, CLUSTER, 3 * CLUSTER, 511 << 20, 512 << 20, 700 << 20, SIZE - CLUSTER)


def node(layers: list[Layer]) -> dict[str, Any]:
    found: dict[str, Any] | None = None
    for layer in layers:
        each: dict[str, Any] = {"driver": layer.format, "file": {"driver": "file", "filename": str(layer.path)}}
        found = each | ({} if layer.format == "raw" else {"backing": found})
    assert found is not None
    return found


@pytest.fixture
def layers(tmp_path: Path) -> list[Layer]:
    base = tmp_path / "base.raw"
    base.touch()
    os.truncate(base, SIZE // 2)  # what lies beyond it is zero
    with base.open("r+b") as file:
        for spot in (0, 2 * CLUSTER, 3 * CLUSTER, 511 << 20):
            os.pwrite(file.fileno(), b"b" * CLUSTER, spot)
    found = [Layer(base, "raw")]
    for number in range(2):
        path = tmp_path / f"{number}.qcow2"
        create_layer(path, size_mb=SIZE >> 20, vm_id="box", layer_id=f"{number:032x}")
        found.append(Layer(path, "qcow2"))
        pattern = 0x41 + number
        orders = [f"write -P {pattern} {spot + number * 4096} 8192" for spot in SPOTS[number::2]]
        orders += [f"write -z {3 * CLUSTER} {CLUSTER}", f"discard {CLUSTER} {CLUSTER}", "flush"]
        chain = "json:" + json.dumps(node(found))
        subprocess.run(
            ["qemu-io", *(word for order in orders for word in ("-c", order)), chain], check=True, capture_output=True
        )
    return found


def test_the_chain_reads_as_qemu_reads_it(layers: list[Layer], tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(node(layers)), flat], check=True)
    chain = Chain(layers)
    with flat.open("rb") as file:
        for spot in SPOTS:
            for offset, size in ((spot, CLUSTER), (max(0, spot - 5000), 3 * CLUSTER + 7), (spot + 4095, 2)):
                expected = os.pread(file.fileno(), size, offset).ljust(size, b"\0")
                assert chain.read(offset, size) == expected, (offset, size)
    chain.close()


@pytest.mark.parametrize(
    ("offset", "value", "what"),
    [
        (0, b"QFI\xfa", "not a qcow2 image"),
        (20, struct.pack(">I", 30), "features"),
        (32, struct.pack(">I", 1), "features"),
        (36, struct.pack(">I", 0), "within the file"),
        (40, struct.pack(">Q", 1 << 40), "within the file"),
        (72, struct.pack(">Q", 4), "features"),
        (3 * CLUSTER, struct.pack(">Q", 1 << 40), "leads nowhere"),
    ],
)
def test_what_no_layer_of_ours_has_is_refused(layers: list[Layer], offset: int, value: bytes, what: str) -> None:
    with layers[-1].path.open("r+b") as file:
        os.pwrite(file.fileno(), value, offset)
    with pytest.raises(Corrupt, match=what):
        chain = Chain(layers)
        try:
            chain.read(0, 10)
        finally:
            chain.close()


def test_a_backing_name_in_a_header_is_not_looked_at(layers: list[Layer], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * CLUSTER)
    subprocess.run(["qemu-img", "rebase", "-u", "-F", "raw", "-b", secret, layers[-1].path], check=True)
    chain = Chain(layers[-1:])
    assert b"s" not in chain.read(0, 4 * CLUSTER)
    chain.close()
