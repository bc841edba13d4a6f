"""What `GET /df` counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from capsem.model.checkpoint import Checkpoint, FrozenLayer, Kind
from capsem.service.usage import Found, Named, usage
from capsem.store import durable
from capsem.store.layout import Layout


def test_layers_are_own_shared_or_nobodys(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.create()
    sizes = {"base": 64, "a": 128, "b": 256, "lost": 512}  # KiB
    for layer, size in sizes.items():
        layout.layer(layer).write_bytes(b"x" * (size << 10))
    with layout.layer("a").open("r+b") as file:
        file.truncate(1 << 40)  # a hole takes nothing
    vms = []
    for vm, layers in (("a", ("base", "a")), ("b", ("base", "b", "gone"))):
        session = layout.session(vm, persistent=True).path
        session.mkdir()
        (session / "vm.json").write_bytes(b"{}" * 4096)
        vms.append(Named(vm, session, layers, "d" * 64))
    (layout.sessions / "x-failed-1").mkdir()
    (layout.sessions / "x-failed-1" / "serial.log").write_bytes(b"x" * 8192)
    image = tmp_path / "image"
    image.mkdir()
    (image / "root").write_bytes(b"x" * 4096)
    images = SimpleNamespace(list=lambda: [SimpleNamespace(name="default", digest="d" * 64, directory=image)])
    found = usage(layout, Found(vms), images)  # type: ignore[arg-type]
    assert [(vm.id, vm.own_bytes >> 10, vm.shared_bytes >> 10) for vm in found.vms] == [("a", 128, 64), ("b", 256, 64)]
    assert all(vm.session_bytes >= 8192 for vm in found.vms)
    assert found.layers_bytes >> 10 == sum(sizes.values())
    assert found.unreferenced_bytes >> 10 == 512
    assert found.failed_bytes >= 8192
    assert [(each.name, each.size_bytes, each.vms) for each in found.images] == [
        ("default", durable.allocated_bytes(image), ["a", "b"])
    ]
    assert found.total_bytes >= found.layers_bytes + found.failed_bytes + 4096


def test_a_vm_owns_what_its_checkpoints_name_and_each_checkpoint_what_nothing_else_does(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.create()
    for layer, size in {"a": 64, "b": 128, "old": 256, "making": 512}.items():
        layout.layer(layer).write_bytes(b"x" * (size << 10))

    def checkpoint(number: int, vm: str, kind: Kind, layers: str, memory: int) -> Checkpoint:
        made = Checkpoint(
            id=f"{number:032x}",
            vm_id=vm,
            kind=kind,
            created_at=number,
            creator="1",
            layers=tuple(FrozenLayer(layer, "") for layer in layers.split()),
            disk_mb=512,
            image="default",
            image_digest="d",
            hardware=1,
            cpus=1,
            ram_mb=256,
        )
        files = layout.checkpoint(made.id)
        files.path.mkdir()
        files.manifest.write_bytes(made.to_json())
        files.memory.write_bytes(b"x" * (memory << 10))
        return made

    checkpoints = [
        checkpoint(1, "box", Kind.MANUAL, "a old", 1024),
        checkpoint(2, "box", Kind.SUSPEND, "a b", 2048),
    ]
    draft = layout.checkpoint("f" * 32)
    draft.path.mkdir()
    draft.memory.write_bytes(b"x" * (4096 << 10))
    vms = [Named("box", tmp_path / "s1", ("a", "b"), "d"), Named("fork", tmp_path / "s2", ("a", "b"), "d")]
    images = SimpleNamespace(list=list)
    found = usage(layout, Found(vms, checkpoints, {"making"}), images)  # type: ignore[arg-type]
    box, fork = found.vms
    assert (box.own_bytes >> 10, box.shared_bytes >> 10) == (256, 64 + 128)
    assert (fork.own_bytes, fork.shared_bytes >> 10, fork.memory_bytes) == (0, 64 + 128, 0)
    assert 1024 + 2048 <= box.memory_bytes >> 10 <= 1024 + 2048 + 32
    assert [(each.own_bytes >> 10, each.shared_bytes >> 10, each.hidden) for each in found.checkpoints] == [
        (256, 64, False),
        (0, 192, True),
    ]
    assert found.unreferenced_bytes == 0
    assert 4096 + 512 <= found.draft_bytes >> 10 <= 4096 + 512 + 32
    assert found.memory_bytes == box.memory_bytes
    assert found.free_bytes > 0
