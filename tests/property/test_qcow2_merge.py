"""Merged layers in QEMU's eyes: chains that qemu-io wrote read the same before and after, and damage is refused or harmless."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import struct
import subprocess
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsem.hypervisor.qemu import driver as driver_module
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.hypervisor.qemu.merge import merge
from capsem.hypervisor.qemu.qcow2 import CLUSTER, Identity, create_layer, read_identity
from capsem.hypervisor.qemu.qcow2_map import SLOTS, LayerMap
from capsem.model.errors import Corrupt

ID = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
SIZE_MB = 1025  # three L2 tables, the last one for a single MiB
HOT = (0, SLOTS - 8, 2 * SLOTS)  # guest clusters, 16 from each of these, are what is written to


def run(*argv: str | Path) -> str:
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chain(base: Path, *layers: Path, top: bool = False) -> str:
    """QEMU's name for a chain in which each layer's backing file is given, never looked for. `top` is as in a machine."""
    node: dict[str, Any] = {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    for path in layers:
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": node}
    if top:
        node |= {"discard": "unmap", "detect-zeroes": "unmap"}
    return "json:" + json.dumps(node)


def write(image: str, commands: list[str]) -> None:
    run("qemu-io", *(word for command in commands for word in ("-c", command)), image)


def some_writes(rng: random.Random) -> list[str]:
    commands = []
    for _ in range(rng.randint(0, 20)):
        offset = (rng.choice(HOT) + rng.randrange(16)) * CLUSTER
        length = rng.randint(1, 4) * CLUSTER
        if rng.random() < 0.3:  # not whole clusters: QEMU copies the rest of them from below
            offset += rng.randrange(1, 16) * 4096
            length = rng.randint(1, 40) * 4096
        length = min(length, (SIZE_MB << 20) - offset)
        how = rng.choice(
            [f"write -P {rng.randint(1, 255)}"] * 5 + ["write -P 0", "write -z", "write -z -u"] + ["discard"] * 2
        )
        commands.append(f"{how} {offset} {length}")
    return commands


def make_chain(directory: Path, rng: random.Random, layers: int) -> tuple[Path, list[Path]]:
    base = directory / "base"
    with base.open("wb") as file:
        file.truncate(SIZE_MB << 20)
        for start in HOT:
            file.seek(start * CLUSTER)
            file.write(rng.randbytes(16 * CLUSTER))
    paths = [directory / f"layer-{place}" for place in range(layers)]
    for place, path in enumerate(paths):
        create_layer(path, size_mb=SIZE_MB, vm_id="box", layer_id=ID)
        write(chain(base, *paths[: place + 1], top=True), some_writes(rng))
    return base, paths


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(10))
def test_a_merged_chain_reads_the_same(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    base, paths = make_chain(tmp_path, rng, layers=rng.randint(2, 6))
    first = rng.randrange(len(paths) - 1)
    last = rng.randint(first + 1, len(paths) - 1)
    before = [digest(path) for path in paths]
    target = tmp_path / "target"

    merge(paths[first : last + 1], target, vm_id="box", layer_id=OTHER)

    assert [digest(path) for path in paths] == before
    after = [*paths[:first], target, *paths[last + 1 :]]
    assert "identical" in run("qemu-img", "compare", chain(base, *paths), chain(base, *after))
    assert "No errors" in run("qemu-img", "check", target)
    info = json.loads(run("qemu-img", "info", "--output=json", target))
    assert info["virtual-size"] == SIZE_MB << 20
    assert "backing-filename" not in info
    assert read_identity(target) == Identity("box", OTHER)
    # and QEMU goes on in it as in any other: nothing that it allocates hits what is there
    write(chain(base, *after[: first + 1], top=True), some_writes(rng))
    assert "No errors" in run("qemu-img", "check", target)


def test_each_kind_of_entry_that_qemu_writes_is_met(tmp_path: Path) -> None:
    """What the other tests rest on: among these layers' entries are data, zeros, and zeros that keep their place."""
    base, (path,) = tmp_path / "base", [tmp_path / "layer"]
    base.write_bytes(b"\1" * (1 << 20))
    create_layer(path, size_mb=1, vm_id="box", layer_id=ID)
    write(
        chain(base, path, top=True), ["write -P 5 0 192k", "write -z 64k 64k", "discard 128k 64k", "write -z 256k 64k"]
    )
    with LayerMap(path) as layer:
        assert [(number, kind.value) for number, kind, _ in layer.clusters()] == [
            (0, "data"),
            (1, "zero"),
            (2, "zero"),
            (4, "zero"),
        ]
        assert layer.allocated_bytes() == CLUSTER
        ((_, table),) = layer.tables()
    content = path.read_bytes()
    (l2,) = struct.unpack_from(">Q", content, 3 * CLUSTER)
    entries = struct.unpack_from(">5Q", content, l2 & ~(1 << 63))
    assert entries[1] & 1
    assert entries[1] > 1
    assert entries[2:] == (1, 0, 1)


def test_l1_tables_of_more_than_a_cluster(tmp_path: Path) -> None:
    size_mb = 5 << 20
    base = tmp_path / "base"
    base.touch()
    with base.open("r+b") as file:
        file.truncate(size_mb << 20)
    paths = [tmp_path / "a", tmp_path / "b"]
    for place, path in enumerate(paths):
        create_layer(path, size_mb=size_mb, vm_id="box", layer_id=ID)
        write(
            chain(base, *paths[: place + 1], top=True), [f"write -P {place + 1} {place}T 64k", "write -P 9 5119G 128k"]
        )
    target = tmp_path / "target"
    merge(paths, target, vm_id="box", layer_id=OTHER)
    assert "No errors" in run("qemu-img", "check", target)
    for place, pattern in (("0", 1), ("1T", 2), ("5119G", 9)):
        write(chain(base, target), [f"read -P {pattern} {place} 64k"])


def test_headers_that_qemu_wrote_anew(tmp_path: Path) -> None:
    """With its feature names, which it adds with any change, and with a backing name, which nobody follows."""
    path = tmp_path / "layer"
    create_layer(path, size_mb=64, vm_id="box", layer_id=ID)
    write(str(path), ["write -P 7 1M 1M"])
    run("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/some/where", path)
    start = path.read_bytes()[:CLUSTER]
    assert struct.pack(">I", 0x6803F857) in start  # feature names
    assert b"/some/where" in start
    target = tmp_path / "target"
    merge([path], target, vm_id="box", layer_id=OTHER)
    assert "No errors" in run("qemu-img", "check", target)
    write(str(target), ["read -P 0 0 1M", "read -P 7 1M 1M", "read -P 0 2M 62M"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """A layer that QEMU has written to, and where in it something decides: header, refcount tables, L1, L2 entries."""
    directory = tmp_path_factory.mktemp("written")
    _, (path,) = make_chain(directory, random.Random(1), layers=1)
    write(str(path), ["write -P 1 0 128k", f"write -P 2 {(SLOTS - 1) * CLUSTER} 256k"])
    content = path.read_bytes()
    places = [*range(300), *range(CLUSTER, CLUSTER + 16), *range(2 * CLUSTER, 2 * CLUSTER + 32)]
    places += range(3 * CLUSTER, 3 * CLUSTER + 24)
    for (entry,) in struct.iter_unpack(">Q", content[3 * CLUSTER : 3 * CLUSTER + 24]):
        table = entry & ~(1 << 63)
        filled = [slot for slot in range(SLOTS) if any(content[table + 8 * slot :][:8])] if table else []
        places += (table + 8 * slot + byte for slot in filled[:8] + filled[-8:] for byte in range(8))
    return content, places


@given(data=st.data())
@settings(max_examples=150)
def test_any_damage_is_refused_or_harmless(written: tuple[bytes, list[int]], data: st.DataObject) -> None:
    content, places = bytearray(written[0]), written[1]
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    with TemporaryDirectory() as name:
        path, target = Path(name, "layer"), Path(name, "target")
        path.write_bytes(content[:length])
        try:
            done = merge([path], target, vm_id="box", layer_id=OTHER)
        except Corrupt:
            assert not target.exists()
        else:
            assert done.copied_bytes <= length
            assert "No errors" in run("qemu-img", "check", target)


def test_the_driver_merges_beside_a_reader(tmp_path: Path) -> None:
    base, paths = make_chain(tmp_path, random.Random(3), layers=3)
    reader = subprocess.Popen(
        ["qemu-io", "-r", chain(base, *paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    try:
        reader.stdin.write("read 0 64k\n")
        reader.stdin.flush()
        assert "read 65536" in reader.stdout.readline()
        asyncio.run(QemuDriver(tmp_path).merge_layers(paths, tmp_path / "target", vm_id="box", layer_id=OTHER))
    finally:
        reader.communicate("quit\n")
    assert reader.returncode == 0
    assert "identical" in run("qemu-img", "compare", chain(base, *paths), chain(base, tmp_path / "target"))


@pytest.mark.parametrize("finishes", [False, True])
def test_a_cancelled_merge_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finishes: bool) -> None:
    """Whether its thread notices, or is done by then."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        create_layer(path, size_mb=SIZE_MB, vm_id="box", layer_id=ID)
    write(str(paths[0]), ["write -P 1 0 1M"])
    started, told = threading.Event(), threading.Event()

    def slow(*args: Any, cancelled: Any, **options: Any) -> Any:
        def look() -> bool:
            started.set()
            told.wait()
            return not finishes and bool(cancelled())

        return merge(*args, cancelled=look, **options)

    monkeypatch.setattr(driver_module, "merge", slow)

    async def main() -> None:
        call = QemuDriver(tmp_path).merge_layers(paths, tmp_path / "target", vm_id="box", layer_id=OTHER)
        work = asyncio.create_task(call)
        await asyncio.to_thread(started.wait)
        for _ in range(2):  # an impatient caller
            work.cancel()
            await asyncio.sleep(0)
        assert not work.done()
        told.set()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())
    assert sorted(tmp_path.iterdir()) == paths
