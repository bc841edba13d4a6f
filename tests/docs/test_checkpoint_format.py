"""docs/checkpoint-format.md is exact: its tables are the manifest's fields, and a reader written from it alone reads
what the product writes."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import typing
import zlib
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.model.checkpoint import Checkpoint, FrozenLayer, GuestState, Kind, Memory, Part
from capsem.store.checkpoints import CheckpointStore, describe
from capsem.store.layout import CheckpointDir, Layout
from capsem.store.ram import RamIdentity, RamWriter

PAGE = (Path(__file__).parent.parent.parent / "docs" / "checkpoint-format.md").read_text()
SIZE = 64 * 4096
ID, LAYER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
TYPES = {str: "string", int: "integer", float: "number", bool: "true or false", tuple: "list"}


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading, by key: the other columns."""
    section = PAGE.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {row[0].strip("`"): row[1:] for row in rows if row[0].startswith("`")}


def documented_type(annotation: Any) -> tuple[str, bool]:
    """The word for a field's type, and whether it may be None."""
    options = [each for each in typing.get_args(annotation) if each is not type(None)]
    optional = type(None) in typing.get_args(annotation)
    plain = options[0] if optional else annotation
    plain = typing.get_origin(plain) or plain
    return TYPES.get(str if plain is Kind else plain, "object"), optional


@pytest.mark.parametrize(
    ("heading", "kind"),
    [("body", Checkpoint), ("layer", FrozenLayer), ("memory", Memory), ("part", Part), ("guest", GuestState)],
)
def test_every_field_of_a_manifest_is_documented(heading: str, kind: type) -> None:
    rows, hints = table(heading), typing.get_type_hints(kind)
    assert list(rows) == [each.name for each in fields(kind)]
    for name, (type_, *more) in rows.items():
        expected, optional = documented_type(hints[name])
        assert type_ == expected, name
        assert not optional or more[0] == "yes", f"{name} is left out when there is nothing to say"


def test_everything_that_must_be_the_same_is_documented(tmp_path: Path) -> None:
    machine = QemuDriver(tmp_path).fingerprint(
        "qemu 7.2.22", hardware=1, accelerator=Accelerator.TCG, cpus=1, ram_mb=256, command_line="quiet"
    )
    rows = table("What must be the same")
    assert [*machine, "image", "kernel", "initrd"] == list(rows)
    for name, value in machine.items():
        assert rows[name][0] == ("list" if isinstance(value, list) else TYPES[type(value)]), name


def test_every_kind_is_documented() -> None:
    assert set(re.findall(r"`(\w+)`", table("body")["kind"][2])) == {str(kind) for kind in Kind}


def test_every_file_of_a_checkpoint_is_documented() -> None:
    files = CheckpointDir(Path("x"))
    names = [files.manifest, files.memory, files.sums, files.devices, files.jobs, files.names, files.draft]
    headings = re.findall(r"^## ([\w.]+)$", PAGE, re.MULTILINE)
    assert [path.name for path in names] == [each for each in headings if each != "Layers"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with one warm checkpoint in it."""
    layout = Layout(tmp_path)
    layout.create()
    QemuDriver(tmp_path / "cache").create_layer(layout.layer(LAYER), size_mb=64, vm_id="box", layer_id=LAYER)
    store = CheckpointStore(layout)
    draft = store.prepare(ID)
    writer = RamWriter(draft.files.memory, draft.files.sums, SIZE)
    content = b"\x01" * 4096 + bytes(4096) + bytes(range(256)) * 16
    runs, written = writer.patch([(8 * 4096, memoryview(content))], compare=False)
    digest = writer.finish(RamIdentity("box", ID, SIZE))
    writer.close()
    draft.files.devices.write_bytes(b"QEVM\0\0\0\3")
    checkpoint = Checkpoint(
        id=ID,
        vm_id="box",
        kind=Kind.MANUAL,
        created_at=1763924259.25,
        creator="1",
        layers=store.freeze([LAYER]),
        disk_mb=64,
        image="default",
        image_digest="ab" * 32,
        hardware=1,
        cpus=1,
        ram_mb=1,
        message='Größe, "quoted" \U0001f600',
        machine=MappingProxyType({"vmm": "qemu 7.2.22", "devices": ["a", "b"]}),
        memory=Memory(SIZE, digest, tuple((at // 4096, length // 4096) for at, length in runs), written),
        devices=describe(draft.files.devices),
        guest=GuestState("b", 1, "00" * 16, "t", synced=True),
        pause=0.00002,
    )
    store.commit(draft, checkpoint)
    return tmp_path


def canonical(value: Any) -> str:
    """The one form of a JSON value; numbers were kept as text."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.decode() if isinstance(value, bytes) else json.dumps(value)


def test_a_reader_written_from_the_page_reads_what_is_written(run_dir: Path) -> None:
    """Nothing of Capsem is used here."""
    directory = run_dir / "store" / "checkpoints" / ID
    assert {each.name for each in directory.iterdir()} == {
        "manifest.json",
        "memory.ram",
        "memory.sums",
        "devices.state",
    }
    manifest = json.loads(
        (directory / "manifest.json").read_bytes(), parse_int=lambda text: text.encode(), parse_float=str.encode
    )
    assert set(manifest) == {"format", "digest", "body"}
    assert manifest["format"] == b"1"
    body = manifest["body"]
    assert hashlib.sha256(canonical(body).encode()).hexdigest() == manifest["digest"]
    assert "parent" not in body
    assert body["message"] == 'Größe, "quoted" \U0001f600'

    memory = body["memory"]
    size = int(memory["size"])
    sums, ram = (directory / "memory.sums").read_bytes(), (directory / "memory.ram").read_bytes()
    assert hashlib.sha256(sums).hexdigest() == memory["digest"]
    assert len(sums) == size // 4096 * 4
    assert len(ram) == size + 4096
    for page, (number,) in enumerate(struct.iter_unpack("<I", sums)):
        assert zlib.crc32(ram[page * 4096 : (page + 1) * 4096]) ^ 0xC71C0011 == number
    identity = json.loads(ram[size:].rstrip(b"\0"))
    assert identity == {"format": 1, "vm_id": "box", "checkpoint_id": ID, "size": size}
    assert [[int(number) for number in run] for run in memory["runs"]] == [[8, 3]]
    assert memory["written"] == b"8192"

    devices = (directory / "devices.state").read_bytes()
    assert [str(len(devices)).encode(), hashlib.sha256(devices).hexdigest()] == [*body["devices"].values()]
    (layer,) = body["layers"]
    head = (run_dir / "store" / "layers" / f"{layer['id']}.qcow2").read_bytes()[:4096]
    assert hashlib.sha256(head).hexdigest() == layer["head"]
    assert struct.unpack_from(">4sI", head) == (b"QFI\xfb", 3)
    at = struct.unpack_from(">I", head, 100)[0]  # header bytes; extensions follow
    kind, length = struct.unpack_from(">II", head, at)
    assert kind == 0x43505349
    assert json.loads(head[at + 8 : at + 8 + length]) == {"format": 1, "vm_id": "box", "layer_id": LAYER}
