"""Files in, values or one typed error out: whatever somebody, or a disk, made of them, nothing else is raised or changed."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsem import config
from capsem.hypervisor.qemu.qcow2 import read_identity
from capsem.hypervisor.qemu.qcow2_map import LayerMap
from capsem.image import manifest as image
from capsem.model.checkpoint import checkpoint_from_json
from capsem.model.errors import CapsemError, Corrupt, InvalidInput
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord, record_from_json
from capsem.service.fleet import Fleet
from capsem.store import archive, jobs, layer_sums, ram, records
from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import SessionDir
from capsem.wire.messages import Exited
from checkpoint_files import SIZE, add_layer, layout, make, new_id
from layer_files import write_layer

MANY = settings(
    max_examples=150, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip

odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.just([]), st.just({}),
    st.just("../../etc/passwd"), st.just("f" * 32), st.lists(st.integers(), max_size=3),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The tree with something else in one place; with ... there, without it."""
    if not path:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def spoilt(good: bytes) -> st.SearchStrategy[bytes]:
    """Cut off, with a byte changed, with bytes put in, or something else altogether."""
    at = st.integers(0, max(0, len(good) - 1))
    return st.one_of(
        st.binary(max_size=60),
        at.map(lambda n: good[:n]),
        st.tuples(at, st.integers(1, 255)).map(lambda p: good[: p[0]] + bytes([good[p[0]] ^ p[1]]) + good[p[0] + 1 :]),
        st.tuples(at, st.binary(max_size=9)).map(lambda p: good[: p[0]] + p[1] + good[p[0] :]),
        st.sampled_from([b"[" * 5000, b"{}", b"null", b"[]", b'"x"', b"1e999", b"\xff\xfe", b"-" * 99, b"9" * 5000]),
    )


def other_json(good: bytes) -> st.SearchStrategy[bytes]:
    """The same JSON with something else, or nothing, in one place."""
    tree = json.loads(good)
    return st.tuples(st.sampled_from(list(places(tree))), odd | st.just(...)).map(
        lambda pair: json.dumps(changed(tree, *pair)).encode()
    )


def one_error(read: Callable[[], object], kind: type[CapsemError] = Corrupt) -> None:
    """Either it can be read, or one error says that it cannot."""
    try:
        read()
    except CapsemError as error:
        told = error
    else:
        return
    assert isinstance(told, kind)
    assert told.message


RECORD = VmRecord("box", True, VmSpec(), "default", "d" * 64, (new_id(1),), 1e9, checkpoint=new_id(2)).to_json()


@MANY
@given(spoilt(RECORD) | other_json(RECORD))
def test_records(data: bytes) -> None:
    one_error(lambda: record_from_json(data, source="vm.json"))


@MANY
@given(spoilt(RECORD))
def test_a_record_s_file_is_left_as_it_is(data: bytes) -> None:
    with TemporaryDirectory() as text:
        session = SessionDir(Path(text))
        session.record.write_bytes(data)
        one_error(lambda: records.read(session))
        assert session.record.read_bytes() == data
        assert os.listdir(text) == [session.record.name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint on one layer."""
    root = tmp_path_factory.mktemp("fuzz")
    where = layout(root)
    add_layer(where, new_id(11))
    make(CheckpointStore(where), new_id(1), (new_id(11),))
    return root


def signed(tree: Any) -> bytes:
    """A manifest of which the digest is right, as somebody would write it who means harm."""
    body = tree.get("body") if isinstance(tree, dict) else None
    if isinstance(body, dict):
        plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
        tree = {**tree, "digest": hashlib.sha256(plain.encode()).hexdigest()}
    return json.dumps(tree).encode()


@MANY
@given(st.data())
def test_checkpoint_manifests(run: Path, data: st.DataObject) -> None:
    good = layout(run).checkpoint(new_id(1)).manifest.read_bytes()
    made = data.draw(spoilt(good) | other_json(good) | other_json(good).map(lambda each: signed(json.loads(each))))
    one_error(lambda: checkpoint_from_json(made, source="manifest.json"))


@MANY
@given(st.data())
def test_checkpoints_with_a_damaged_part(run: Path, data: st.DataObject) -> None:
    """Any of the parts, cut off or changed: it is opened and verified as it was written, or not at all."""
    store, files = CheckpointStore(layout(run)), layout(run).checkpoint(new_id(1))
    path = data.draw(st.sampled_from([files.manifest, files.devices, files.memory, files.sums]))
    good = path.read_bytes()
    made = data.draw(spoilt(good).filter(lambda each: each != good))
    path.write_bytes(made)
    try:
        with pytest.raises(Corrupt):
            store.verify(new_id(1))
        assert path.read_bytes() == made
    finally:
        path.write_bytes(good)
    store.verify(new_id(1))


IDENTITY = ram.RamIdentity("box", new_id(1), SIZE).to_bytes()


@MANY
@given(spoilt(IDENTITY.rstrip(b"\0")))
def test_what_stands_behind_memory(data: bytes) -> None:
    with TemporaryDirectory() as text:
        path = Path(text) / "memory.ram"
        path.write_bytes(bytes(SIZE) + data[: ram.TRAILER].ljust(ram.TRAILER, b"\0"))
        one_error(lambda: ram.read_identity(path, SIZE))


JOBS = jobs.encode(
    [
        jobs.SavedJob("a" * 32, "echo", jobs.SavedOutput(9, b"output"), jobs.SavedOutput(0, b"")),
        jobs.SavedJob("b" * 32, "true", jobs.SavedOutput(0, b""), jobs.SavedOutput(3, b"err"), Exited(exit_code=1)),
    ]
)
HEAD, BODY = JOBS.split(b"\n", 1)


@MANY
@given(spoilt(JOBS) | other_json(HEAD).map(lambda head: head + b"\n" + BODY))
def test_the_jobs_of_a_checkpoint(data: bytes) -> None:
    one_error(lambda: jobs.decode(data, source="jobs.state"))


@MANY
@given(spoilt(b'{"size": 8192, "sha256": "' + b"a" * 64 + b'"}\n'))
def test_checksums_of_layers(data: bytes) -> None:
    with TemporaryDirectory() as text:
        layer, sums = Path(text) / "layer", Path(text) / "sum"
        layer.write_bytes(bytes(8192))
        sums.write_bytes(data)
        with pytest.raises(Corrupt):
            layer_sums.check(layer, sums)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("layer") / "layer.qcow2"
    write_layer(path, {0: 1, 5: None, 9: 3}, size_mb=64, layer_id="a" * 32)
    return path.read_bytes()


@MANY
@given(st.data())
def test_layers(layer: bytes, data: st.DataObject) -> None:
    """Header, tables, and what they point at: a guest that has escaped, or a stranger's export, may have written it."""
    made = bytearray(layer)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 130), st.integers(0, len(layer) // 8 - 1).map(lambda n: n * 8)))
        value = data.draw(st.binary(min_size=1, max_size=8))
        made[at : at + len(value)] = value
    cut = data.draw(st.sampled_from([len(made), 0, 3, 100, 65536, len(made) - 1]))
    with TemporaryDirectory() as text:
        path = Path(text) / "layer.qcow2"
        path.write_bytes(made[:cut])
        before = path.read_bytes()

        def read() -> None:
            with LayerMap(path) as it:
                list(it.clusters())

        one_error(read)
        one_error(lambda: read_identity(path))
        assert path.read_bytes() == before


IMAGE = image.Manifest(
    name="default", architecture="x86_64", recipe={}, recipe_digest="r", kernel_version="6", kernel_command_line="quiet",
    packages={}, files={role: image.File(name, 1, "sha256:0") for role, name in image.ROLES.items()}, created_at=1e9,
).to_json()  # fmt: skip


@MANY
@given(spoilt(IMAGE) | other_json(IMAGE))
def test_manifests_of_images(data: bytes) -> None:
    with TemporaryDirectory() as text:
        path = Path(text) / image.NAME
        path.write_bytes(data)
        one_error(lambda: image.read(path))
        assert path.read_bytes() == data


SETTINGS = b'[vm]\non_service_stop = "keep"\n[vm.resources]\nram_gb = 2.5\ncpu_count = 2\n'


@MANY
@given(spoilt(SETTINGS) | st.binary(max_size=80).map(lambda each: SETTINGS + each) | st.just(b"a = " + b"[" * 5000))
def test_settings(data: bytes) -> None:
    with TemporaryDirectory() as text:
        path = Path(text) / "config.toml"
        path.write_bytes(data)
        one_error(lambda: config.load({"CAPSEM_HOME": text, "HOME": text}), InvalidInput)
        assert path.read_bytes() == data


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parts") / "part"
    path.write_bytes(b"x" * 9000 + bytes(20000) + b"y" * 100)
    with path.open("rb", buffering=0) as file:
        return b"".join(
            archive.encode([archive.Source("one", file.fileno(), 29100), archive.Source("two", file.fileno(), 50)])
        )


@MANY
@given(st.data())
def test_exported_streams(exported: bytes, data: st.DataObject) -> None:
    made = data.draw(spoilt(exported).filter(lambda each: each != exported))
    size = data.draw(st.integers(1, 40000))

    def read() -> None:
        decoder = archive.Decoder()
        for at in range(0, len(made), size):
            list(decoder.feed(made[at : at + size]))
        decoder.finish()

    with pytest.raises(Corrupt):
        read()


@settings(MANY, max_examples=25)
@given(st.data())
def test_a_service_lists_what_it_cannot_read_and_touches_nothing(data: st.DataObject) -> None:
    """A whole run directory with one spoilt record, and no index that can be read: it starts, and says so."""
    made = data.draw(spoilt(RECORD).filter(lambda each: not _good(each)))
    with TemporaryDirectory() as text:
        where = layout(Path(text))
        add_layer(where, new_id(1))
        for name, content in (("box", made), ("well", dataclasses.replace(_record(), id="well").to_json())):
            session = where.session(name, persistent=True)
            session.path.mkdir()
            session.record.write_bytes(content)
        where.registry.write_bytes(data.draw(st.binary(max_size=40)))

        async def scene() -> dict[str, str]:
            clock = SimpleNamespace(boot_id=lambda: "boot", time=lambda: 1e9)
            fleet = Fleet(SimpleNamespace(clock=clock, entropy=None), where, 10)  # type: ignore[arg-type]
            await fleet.reconcile()
            fleet.leave_all()
            return {vm.id: str(vm.status) for vm in fleet.all()}

        assert asyncio.run(scene()) == {"box": "Defunct", "well": "Stopped"}
        assert where.session("box", persistent=True).record.read_bytes() == made
        assert where.layer(new_id(1)).exists()
        assert set(json.loads(where.registry.read_bytes())["vms"]) == {"box", "well"}


def _record() -> VmRecord:
    return dataclasses.replace(record_from_json(RECORD, source=""), checkpoint=None)


def _good(data: bytes) -> bool:
    try:
        record = record_from_json(data, source="")
    except Corrupt:
        return False
    return record.id == "box" and record.persistent
