"""What `GET /df` counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from capsem.service.usage import Named, usage
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
    found = usage(layout, vms, images)  # type: ignore[arg-type]
    assert [(vm.id, vm.own_bytes >> 10, vm.shared_bytes >> 10) for vm in found.vms] == [("a", 128, 64), ("b", 256, 64)]
    assert all(vm.session_bytes >= 8192 for vm in found.vms)
    assert found.layers_bytes >> 10 == sum(sizes.values())
    assert found.unreferenced_bytes >> 10 == 512
    assert found.failed_bytes >= 8192
    assert [(each.name, each.size_bytes, each.vms) for each in found.images] == [
        ("default", durable.allocated_bytes(image), ["a", "b"])
    ]
    assert found.total_bytes >= found.layers_bytes + found.failed_bytes + 4096
