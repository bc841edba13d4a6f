"""Checkpoints leave one host and come to another; what is not as it was written, or was written to do harm, does not."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.model.checkpoint import Checkpoint, GuestState, Kind, Memory, checkpoint_from_json
from capsem.model.errors import AlreadyExists, CapsemError, Corrupt, NotFound, WrongState
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.service.launch import assets
from capsem.store.archive import MAGIC, Decoder
from capsem.store.checkpoints import describe
from capsem.store.ram import PAGE, RamIdentity, RamWriter
from layer_files import read_layer, write_layer
from service_world import World

CHECKPOINT, LAYERS = "c" * 32, ("a" * 32, "b" * 32)
RAM_MB, DISK_MB = 256, 512


class Host(World):
    """Its layers are real ones."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.driver.merge_layers = QemuDriver(directory).merge_layers  # type: ignore[method-assign]


def host(directory: Path) -> Host:
    directory.mkdir()
    return Host(directory)


async def with_checkpoint(it: Host) -> Checkpoint:
    """A suspended VM, as a supervisor would have left it."""
    store, layout = it.fleet.checkpoints, it.layout
    write_layer(layout.layer(LAYERS[0]), {0: 1, 5: 2, 100: 3}, size_mb=DISK_MB, layer_id=LAYERS[0])
    write_layer(layout.layer(LAYERS[1]), {5: 7, 6: None}, size_mb=DISK_MB, layer_id=LAYERS[1])
    draft = store.prepare(CHECKPOINT)
    ram = RamWriter(draft.files.memory, draft.files.sums, RAM_MB << 20)
    ram.patch(
        [(PAGE * 7, memoryview(b"x" * PAGE * 3)), ((RAM_MB << 20) - PAGE, memoryview(b"y" * PAGE))], compare=False
    )
    digest = ram.finish(RamIdentity("box", CHECKPOINT, RAM_MB << 20))
    ram.close()
    draft.files.devices.write_bytes(b"the state of the devices")
    draft.files.jobs.write_bytes(b"what ran")
    draft.files.names.write_bytes(b"of this host's network: no business of another's")
    record = VmRecord("box", True, VmSpec(1, RAM_MB, DISK_MB), "default", it.catalog.image.digest, LAYERS, 1e9)
    image = it.catalog.image
    machine = it.driver.fingerprint(
        await it.driver.version(),
        hardware=1,
        accelerator=await it.driver.accelerator(),
        cpus=1,
        ram_mb=RAM_MB,
        command_line=image.kernel_command_line,
    )
    checkpoint = Checkpoint(
        id=CHECKPOINT,
        vm_id="box",
        kind=Kind.MANUAL,
        created_at=1e9,
        creator="1",
        layers=store.freeze(LAYERS),
        disk_mb=DISK_MB,
        image="default",
        image_digest=record.image_digest,
        hardware=1,
        cpus=1,
        ram_mb=RAM_MB,
        parent="d" * 32,
        message="kept",
        machine=MappingProxyType({**machine, **assets(image)}),  # type: ignore[arg-type]
        memory=Memory(RAM_MB << 20, digest, ((7, 3),), 4 * PAGE),
        devices=describe(draft.files.devices),
        names=describe(draft.files.names),
        guest=GuestState("boot", 3, "0" * 32, "token", synced=True),
    )
    store.commit(draft, checkpoint)
    session = layout.session("box", persistent=True)
    session.path.mkdir()
    from capsem.store import records

    records.write(session, record)
    it.fleet.add(session, record)
    return checkpoint


async def exported(it: Host) -> bytes:
    await with_checkpoint(it)
    stream = await it.handlers.export_checkpoint("box", "c")
    return b"".join([piece async for piece in stream])


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def nothing_is_left(it: Host) -> None:
    await it.fleet.cleared()
    assert not list(it.layout.layers.glob("*.qcow2"))
    assert not list(it.layout.checkpoints.iterdir())
    assert not it.fleet.known()
    assert not it.fleet.spare


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    async def made() -> bytes:
        return await exported(host(tmp_path_factory.mktemp("from") / "host"))

    return asyncio.run(made())


def test_with_trust_everything_comes_and_without_it_the_disk(tmp_path: Path, stream: bytes) -> None:
    async def scene() -> None:
        it = host(tmp_path / "to")
        made = await it.handlers.import_checkpoint("twin", pieces(stream, 7), trust=True)
        assert (made.status, made.checkpoint) == ("Suspended", CHECKPOINT)
        kept = it.fleet.checkpoints.verify(CHECKPOINT)
        record = it.fleet.get("twin").record
        assert (kept.kind, kept.vm_id, kept.parent, kept.layer_ids) == (Kind.FORK, "box", None, record.layers)
        assert (record.checkpoint, record.forked_from, record.spec.ram_mb) == (CHECKPOINT, "box", RAM_MB)
        files = it.layout.checkpoint(CHECKPOINT)
        assert files.jobs.read_bytes() == b"what ran"
        assert sorted(path.name for path in files.path.iterdir()) == sorted(
            path.name for path in (files.devices, files.jobs, files.manifest, files.memory, files.sums)
        )
        assert read_layer(it.layout.layer(record.layers[0])) == {0: 1, 5: 7, 6: None, 100: 3}
        with pytest.raises(AlreadyExists, match="is on this host already"):
            await it.handlers.import_checkpoint("triplet", pieces(stream), trust=True)
        with pytest.raises(AlreadyExists, match="twin"):
            await it.handlers.import_checkpoint("twin", pieces(stream), trust=False)

        cold = await it.handlers.import_checkpoint("cold", pieces(stream), trust=False)
        assert (cold.status, cold.checkpoint) == ("Stopped", None)
        below, _top = it.fleet.get("cold").record.layers
        assert read_layer(it.layout.layer(below)) == {0: 1, 5: 7, 6: None, 100: 3}
        for vm_id in ("twin", "cold"):
            await it.handlers.delete(vm_id)
        await nothing_is_left(it)

    asyncio.run(scene())


def test_any_byte_that_changes_and_any_end_too_early_is_noticed(tmp_path: Path, stream: bytes) -> None:
    async def scene() -> None:
        it, dice = host(tmp_path / "to"), random.Random(1)
        heads = list(range(len(MAGIC) + 60)) + list(range(len(stream) - 60, len(stream)))
        for at in [*heads, *(dice.randrange(len(stream)) for _ in range(150))]:
            changed = bytearray(stream)
            changed[at] ^= 1 << dice.randrange(8)
            with pytest.raises(CapsemError):
                await it.handlers.import_checkpoint("twin", pieces(bytes(changed)), trust=bool(at % 2))
            await nothing_is_left(it)
        for end in [0, len(MAGIC), *(dice.randrange(len(stream)) for _ in range(40)), len(stream) - 1]:
            with pytest.raises(Corrupt, match="cut off"):
                await it.handlers.import_checkpoint("twin", pieces(stream[:end]), trust=bool(end % 2))
            await nothing_is_left(it)
        with pytest.raises(Corrupt, match="follows its end"):
            await it.handlers.import_checkpoint("twin", pieces(stream + b"\0"), trust=False)
        await nothing_is_left(it)

    asyncio.run(scene())


def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path, stream: bytes) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield stream[: len(stream) // 2]
        raise ConnectionResetError

    async def scene() -> None:
        it = host(tmp_path / "to")
        with pytest.raises((CapsemError, ConnectionResetError)):
            await it.handlers.import_checkpoint("twin", broken(), trust=True)
        await nothing_is_left(it)

    asyncio.run(scene())


# -- made to do harm: every digest is right


def parts(stream: bytes) -> list[tuple[bytes, int, bytes]]:
    return [(event.kind, event.number, event.data) for event in Decoder().feed(stream)]


def sealed(events: list[tuple[bytes, int, bytes]]) -> bytes:
    import hashlib

    digest = hashlib.sha256(MAGIC)
    whole = bytearray(MAGIC)
    for kind, number, data in events:
        payload = digest.digest() if kind in b"EZ" else data
        frame = struct.pack(">cQI", kind, number, len(payload)) + payload
        digest.update(frame)
        whole += frame
    return bytes(whole)


def with_manifest(stream: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A stream whose manifest says something else, with a digest that is right."""
    events = parts(stream)
    plain = checkpoint_from_json(events[1][2], source="x")
    body = json.loads(plain.to_json())["body"]
    change(body)
    from capsem.model.checkpoint import _digest

    data = json.dumps({"format": 1, "digest": _digest(body), "body": body}).encode()
    return sealed([(b"P", len(data), b"manifest.json"), (b"D", 0, data), *events[2:]])


def renamed(stream: bytes, old: bytes, new: bytes) -> bytes:
    return sealed(
        [(kind, number, new if (kind, data) == (b"P", old) else data) for kind, number, data in parts(stream)]
    )


def patched(stream: bytes, part: bytes, offset: int, data: bytes) -> bytes:
    found, inside = [], False
    for kind, number, payload in parts(stream):
        inside = payload == part if kind == b"P" else inside
        if kind == b"D" and inside and number <= offset < number + len(payload):
            at = offset - number
            payload = payload[:at] + data + payload[at + len(data) :]
        found.append((kind, number, payload))
    return sealed(found)


HARM: dict[str, tuple[Callable[[bytes], bytes], type[CapsemError], str]] = {
    "a path for a name": (lambda s: renamed(s, b"layer-0", b"../../../x"), Corrupt, "no such part"),
    "a part twice": (lambda s: renamed(s, b"layer-1", b"layer-0"), Corrupt, "no such part"),
    "memory that is not there": (lambda s: renamed(s, b"memory.ram", b"layer-0"), Corrupt, "no such part"),
    "a huge disk": (lambda s: with_manifest(s, lambda b: b.update(disk_mb=1 << 40)), Corrupt, "disk_mb"),
    "a number that is text": (lambda s: with_manifest(s, lambda b: b.update(cpus="1")), Corrupt, "manifest"),
    "a number that is true": (lambda s: with_manifest(s, lambda b: b.update(hardware=True)), Corrupt, "manifest"),
    "another memory": (lambda s: with_manifest(s, lambda b: b["memory"].update(size=1 << 50)), Corrupt, "memory"),
    "no devices": (lambda s: with_manifest(s, lambda b: b.pop("devices")), Corrupt, "half"),
    "no layers": (lambda s: with_manifest(s, lambda b: b.update(layers=[])), Corrupt, "0 layers"),
    "a name out of its place": (lambda s: with_manifest(s, lambda b: b.update(vm_id="../x")), Corrupt, "manifest"),
    "an id out of its place": (lambda s: with_manifest(s, lambda b: b.update(id="../x")), Corrupt, "manifest"),
    "a nonce of another form": (
        lambda s: with_manifest(s, lambda b: b["guest"].update(next_nonce="zz")),
        Corrupt,
        "nonce",
    ),
    "another image": (lambda s: with_manifest(s, lambda b: b.update(image_digest="0" * 64)), NotFound, "image"),
    "another disk": (lambda s: with_manifest(s, lambda b: b.update(disk_mb=1024)), Corrupt, "not 1024 MiB"),
    "another VMM": (lambda s: with_manifest(s, lambda b: b["machine"].update(vmm="old")), WrongState, "vmm"),
    "other devices": (lambda s: patched(s, b"devices.state", 3, b"X"), Corrupt, "devices"),
    "other memory": (lambda s: patched(s, b"memory.ram", PAGE * 8, b"z"), Corrupt, "memory"),
    "a backing file": (lambda s: patched(s, b"layer-0", 72, struct.pack(">Q", 4)), Corrupt, "features"),
    "a table that leads nowhere": (
        lambda s: patched(s, b"layer-0", 3 << 16, struct.pack(">Q", 1 << 50)),
        Corrupt,
        "leads",
    ),
    "a manifest without end": (
        lambda s: sealed([(b"P", 1 << 40, b"manifest.json"), *parts(s)[1:]]),
        Corrupt,
        "manifest.json has",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_made_to_do_harm_is_refused_with_the_reason(tmp_path: Path, stream: bytes, harm: str) -> None:
    change, error, words = HARM[harm]

    async def scene() -> None:
        it = host(tmp_path / "to")
        with pytest.raises(error, match=words):
            await it.handlers.import_checkpoint("twin", pieces(change(stream)), trust=True)
        await nothing_is_left(it)

    asyncio.run(scene())


def test_deeply_nested_json_is_no_manifest(tmp_path: Path) -> None:
    async def scene() -> None:
        it = host(tmp_path / "to")
        data = b"[" * 500_000
        evil = sealed([(b"P", len(data), b"manifest.json"), (b"D", 0, data), (b"E", 0, b"")])
        with pytest.raises(Corrupt):
            await it.handlers.import_checkpoint("twin", pieces(evil), trust=False)
        await nothing_is_left(it)

    asyncio.run(scene())


def test_a_backing_name_in_a_layer_ends_at_the_import(tmp_path: Path, stream: bytes) -> None:
    async def scene() -> None:
        it = host(tmp_path / "to")
        evil = patched(stream, b"layer-0", 8, struct.pack(">QI", 300, 11))
        evil = patched(evil, b"layer-0", 300, b"/etc/passwd")
        await it.handlers.import_checkpoint("twin", pieces(evil), trust=False)
        below, _top = it.fleet.get("twin").record.layers
        assert b"/etc/passwd" not in it.layout.layer(below).read_bytes()
        assert read_layer(it.layout.layer(below)) == {0: 1, 5: 7, 6: None, 100: 3}

    asyncio.run(scene())
