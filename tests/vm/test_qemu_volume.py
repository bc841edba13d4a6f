"""The volume: our layers in QEMU's eyes, the chain of a machine, layers that are added while it runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from qemu_bench import ID, Bench, ask, bench_fixture, hear, machine, open_files, vm_test  # noqa: F401

from capsem.hypervisor.driver import Layer
from capsem.hypervisor.qemu.qcow2 import Identity, create_layer, read_identity
from capsem.model.errors import MachineFailed

pytestmark = pytest.mark.vm


def qemu_img(*args: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    options = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *options, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("size_mb", [1, 512, 16 * 1024, 1024 * 1024, 5 * 1024 * 1024])
def test_qemu_takes_our_layers_for_its_own(tmp_path: Path, size_mb: int) -> None:
    path = tmp_path / "layer"
    create_layer(path, size_mb=size_mb, vm_id="box", layer_id=ID)
    assert "No errors" in qemu_img("check", path)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert info["format"] == "qcow2"
    assert info["virtual-size"] == size_mb << 20
    assert info["cluster-size"] == 65536
    assert "backing-filename" not in info
    assert info["format-specific"]["data"]["corrupt"] is False


def test_the_identity_survives_whatever_qemu_does_to_a_layer(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    create_layer(path, size_mb=1024, vm_id="box", layer_id=ID)
    qemu_io(path, "write -P 7 0 1M", "write -P 8 700M 3M", "discard 0 64k", "flush")
    qemu_img("snapshot", "-c", "x", path)
    qemu_img("snapshot", "-d", "x", path)
    qemu_img("amend", "-o", "lazy_refcounts=on", path)
    qemu_img("resize", path, "3G")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/some/where", path)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", path)
    qemu_img("check", path)
    assert read_identity(path) == Identity("box", ID)


@vm_test
async def test_backing_names_in_headers_are_never_followed(bench: Bench) -> None:
    """A layer whose header names a secret as its backing file: opened over what we say, or over nothing."""
    secret, layer = bench.root / "secret", bench.root / "evil.qcow2"
    secret.write_bytes(b"s" * 65536)
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", layer, "16M")
    for chain in ((Layer(layer, "qcow2"),), (Layer(bench.root / "base.img", "raw"), Layer(layer, "qcow2"))):
        async with machine(bench, bench.spec(volume=chain)) as running:
            links = {str(Path(each.path).readlink()) for each in os.scandir(f"/proc/{running.pid}/fd")}
            assert str(layer) in links
            assert str(secret) not in links


@vm_test
async def test_a_volume_serves_one_machine_at_a_time(bench: Bench) -> None:
    async with machine(bench):
        with pytest.raises(MachineFailed, match="lock") as caught:
            await bench.driver.start(bench.spec(), vmm_lock=0)
        assert "another process uses" in str(caught.value.hint)


@vm_test
async def test_layers_are_added_while_the_guest_runs(bench: Bench) -> None:
    spec = bench.spec()
    async with machine(bench, spec) as running:
        assert running.top_layer == spec.volume[-1]
        await running.run()
        assert await hear(running) == b"R"
        for count, name in enumerate(("second.qcow2", "third.qcow2"), start=1):
            await running.add_layer(bench.layer(name))
            assert running.top_layer == bench.layer(name)
            assert await ask(running) == str(count).encode()
        files = await open_files(running)
        assert {name for name, writable in files.items() if writable} == {"third.qcow2"}
        assert {"base.img", "top.qcow2", "second.qcow2"} <= files.keys()
        fork = (*spec.volume, bench.layer("second.qcow2"), bench.layer("fork.qcow2"))
        async with machine(bench, bench.spec(volume=fork)):  # what was frozen can be shared at once
            pass
    chain = (*spec.volume, bench.layer("second.qcow2"), bench.layer("third.qcow2"))
    async with machine(bench, bench.spec(volume=chain)):
        pass


@vm_test
async def test_a_layer_that_cannot_be_added_changes_nothing(bench: Bench) -> None:
    spec = bench.spec()
    (bench.root / "broken.qcow2").write_bytes(b"no image")
    async with machine(bench, spec) as running:
        before = await open_files(running)
        for name in ("nowhere.qcow2", "broken.qcow2"):
            with pytest.raises(MachineFailed):
                await running.add_layer(Layer(bench.root / name, "qcow2"))
        assert running.top_layer == spec.volume[-1]
        assert await open_files(running) == before
        await running.add_layer(bench.layer("good.qcow2"))
        assert running.top_layer == bench.layer("good.qcow2")


@vm_test
async def test_the_bulk_slot_can_be_filled_and_emptied(bench: Bench) -> None:
    (bench.root / "bulk").write_bytes(b"b" * 65536)
    async with machine(bench) as running:
        monitor = running._monitor
        await monitor.blockdev_add(
            {"driver": "file", "node-name": "bulk-1", "filename": str(bench.root / "bulk"), "read-only": True}
        )
        for node in ("bulk-1", "bulk"):
            await monitor.execute("qom-set", path="/machine/peripheral/bulk-disk", property="drive", value=node)
        await monitor.blockdev_del("bulk-1")
