"""The order of a build, what an interrupted one leaves, and what is done only once: with tools that pretend."""

from __future__ import annotations

import gzip
import json
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from capsem.image import recipe as recipes
from capsem.image.build import _write_with_holes, build
from capsem.image.catalog import Catalog, Image
from capsem.image.host import Host
from capsem.image.recipe import Recipe
from capsem.model.errors import HostNotReady, MachineFailed
from capsem.store import durable

RECIPE = Recipe(early_modules=("erofs",), late_modules=("dummy",), volume_mb=512)


def kernel() -> bytes:
    """A bzImage around an ELF file with a PVH note (see test_image_kernel.py)."""
    note = struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)
    elf = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<Q", 64) + bytes(14) + struct.pack("<HH", 56, 1)
    elf = elf.ljust(64, b"\0") + struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4) + note
    payload = gzip.compress(elf, mtime=0)
    head = bytearray(1024)
    head[0x1F1], head[0x202:0x208] = 1, b"HdrS\x0f\x02"
    head[0x248:0x250] = struct.pack("<II", 0, len(payload))
    return bytes(head) + payload


class Pretender(Host):
    """A host whose tools only leave behind what the next step looks for."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail_at: str | None = None
        self.missing: set[str] = set()
        self.packages = "1.0"
        self.during_base: Callable[[], None] = lambda: None

    def is_root(self) -> bool:
        return True

    def may_contain(self) -> bool:
        return False

    def require(self, *tools: str) -> None:
        if self.missing & {*tools}:
            raise HostNotReady("something is missing", hint="apt-get install -y it")

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> bytes:
        self.ran.append(argv[0])
        if argv[0] == self.fail_at:
            raise MachineFailed(f"{argv[0]} failed")
        if argv[0] == "mmdebstrap":
            assert on_line is not None
            on_line("I: extracting archives...")
            self.during_base()
            next(Path(each) for each in argv if each.endswith(".tar.zst")).write_text(self.packages)
        elif argv[0] == "tar":
            archive, tree = (each.split("=")[1] for each in argv if each.startswith(("--file", "--directory")))
            self._base(Path(tree), Path(archive).read_text())
        elif argv[0] == "mkfs.erofs":
            Path(argv[-2]).write_bytes(b"".join(path.read_bytes() for path in sorted(Path(argv[-1]).rglob("*.py"))))
        return b""

    @staticmethod
    def _base(tree: Path, version: str) -> None:
        modules = "capsem-kernel/tree/usr/lib/modules/6.12"
        for name, data in {
            "capsem-kernel/package": b"linux-image-6.12 6.12-1",
            "capsem-kernel/tree/boot/vmlinuz-6.12": kernel(),
            f"{modules}/modules.dep": b"kernel/erofs.ko:\nkernel/dummy.ko:\n",
            f"{modules}/modules.builtin": b"",
            f"{modules}/kernel/erofs.ko": b"erofs",
            f"{modules}/kernel/dummy.ko": b"dummy",
            "etc/dpkg/dpkg.cfg.d/x": b"",
            "usr/bin/busybox": b"ELF",
            "usr/lib/os-release": b"",
            "usr/sbin/x": b"",
            "var/lib/dpkg/status": f"Package: bash\nStatus: install ok installed\nVersion: {version}\n".encode(),
        }.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(data)


@pytest.fixture
def host() -> Pretender:
    return Pretender()


def names(images: Path) -> set[str]:
    return {path.name for path in images.iterdir()} - {".build.lock", "cache", "users"}


def make(images: Path, host: Host, recipe: Recipe = RECIPE, *, force: bool = False, mirror: str | None = None) -> Image:
    return build(recipe, images, host=host, force=force, mirror=mirror)


def test_makes_an_image_that_the_catalog_finds(tmp_path: Path, host: Pretender) -> None:
    steps: list[tuple[str, float | None]] = []
    image = build(RECIPE, tmp_path / "images", host=host, progress=lambda *step: steps.append(step))
    assert Catalog([tmp_path / "images"], tmp_path).find() == image
    assert image.directory.name == f"default-{image.digest[:12]}"
    assert image.manifest.packages == {"bash": "1.0", "linux-image-6.12": "6.12-1"}
    assert image.manifest.kernel_version == "6.12"
    assert image.volume_mb == 512
    assert {path.stat().st_mode & 0o777 for path in image.directory.iterdir()} == {0o644}
    assert ("base system: extracting archives", 0.25) in steps
    assert steps[-1] == ("done", 1.0)
    parts = [part for _, part in steps if part is not None]
    assert parts == sorted(parts)


def test_zeroes_of_the_kernel_take_no_space(tmp_path: Path) -> None:
    data = b"head" + bytes(3 << 20) + b"tail" + bytes(5000)
    _write_with_holes(tmp_path / "vmlinux", data)
    assert (tmp_path / "vmlinux").read_bytes() == data
    assert durable.allocated_bytes(tmp_path / "vmlinux") < 1 << 20


def test_an_unchanged_recipe_is_no_work(tmp_path: Path, host: Pretender) -> None:
    first = make(tmp_path, host)
    host.ran.clear()
    host.missing = {"mmdebstrap", "tar", "mkfs.erofs"}
    assert make(tmp_path, host) == first
    assert host.ran == []


def test_a_change_of_the_agent_needs_no_network(
    tmp_path: Path, host: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path, host)
    files = recipes.guest_files() | {"capsem/guest/new.py": b"pass"}
    monkeypatch.setattr(recipes, "guest_files", lambda: files)
    monkeypatch.setattr("capsem.image.build.guest_files", lambda: {**files})
    second = make(tmp_path, host)
    assert second.digest != first.digest
    assert host.ran.count("mmdebstrap") == 1
    assert names(tmp_path) == {"default.json", first.directory.name, second.directory.name}


def test_what_decides_the_base_fetches_a_new_one_and_drops_the_old(tmp_path: Path, host: Pretender) -> None:
    make(tmp_path, host)
    make(tmp_path, host, replace(RECIPE, packages=("bash",)))
    assert host.ran.count("mmdebstrap") == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    make(tmp_path, host, replace(RECIPE, name="other"))
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_force_fetches_packages_anew(tmp_path: Path, host: Pretender) -> None:
    first = make(tmp_path, host)
    host.packages = "2.0"
    second = make(tmp_path, host, force=True)
    assert second.manifest.packages["bash"] == "2.0"
    assert host.ran.count("mmdebstrap") == 2
    assert second.digest == first.digest  # this pretended root file system holds no package
    assert names(tmp_path) == {"default.json", first.directory.name}


@pytest.mark.parametrize("tool", ["mmdebstrap", "tar", "chroot", "mkfs.erofs", "mke2fs", "debugfs"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, host: Pretender, tool: str) -> None:
    first = make(tmp_path, host)
    before = names(tmp_path)
    host.fail_at = tool
    with pytest.raises((MachineFailed, HostNotReady)):
        make(tmp_path, host, replace(RECIPE, packages=("bash",)))
    assert names(tmp_path) == before
    assert Catalog([tmp_path], tmp_path).find() == first
    assert not list((tmp_path / "cache").glob(".tmp-*"))
    host.fail_at = None
    make(tmp_path, host, replace(RECIPE, packages=("bash",)))


def test_a_mirror_that_cannot_be_reached_is_the_hosts_affair(tmp_path: Path, host: Pretender) -> None:
    host.fail_at = "mmdebstrap"
    with pytest.raises(HostNotReady, match="--mirror"):
        make(tmp_path, host)


def test_what_a_killed_build_left_is_swept(tmp_path: Path, host: Pretender) -> None:
    for stale in (".tmp-build-abc/tree/usr", ".tmp-removed-default-000000000000", "cache/.tmp-default-1.tar.zst"):
        (tmp_path / stale).mkdir(parents=True)
    image = make(tmp_path, host)
    assert names(tmp_path) == {"default.json", image.directory.name}
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_a_base_that_was_not_noted_down_is_fetched_again(tmp_path: Path, host: Pretender) -> None:
    make(tmp_path, host)
    next((tmp_path / "cache").glob("*.json")).unlink()
    make(tmp_path, host, replace(RECIPE, volume_mb=513))
    assert host.ran.count("mmdebstrap") == 2


def test_a_damaged_image_is_made_again(tmp_path: Path, host: Pretender) -> None:
    first = make(tmp_path, host)
    first.root.write_bytes(b"cut short")
    assert make(tmp_path, host).digest == first.digest
    assert first.root.read_bytes() != b"cut short"
    (tmp_path / "default.json").write_text("{")
    assert make(tmp_path, host).digest == first.digest
    assert Catalog([tmp_path], tmp_path).find().digest == first.digest


def test_another_recipe_for_the_same_files_is_work_once(tmp_path: Path, host: Pretender) -> None:
    first = make(tmp_path, host)
    other = replace(RECIPE, packages=("bash",))
    assert make(tmp_path, host, other).digest == first.digest
    host.ran.clear()
    assert make(tmp_path, host, other).manifest.recipe["packages"] == ["bash"]
    assert host.ran == []


def test_missing_tools_are_told_before_any_work(tmp_path: Path, host: Pretender) -> None:
    host.missing = {"mkfs.erofs"}
    with pytest.raises(HostNotReady, match="apt-get install"):
        make(tmp_path, host)
    assert host.ran == []


def test_an_ordinary_user_is_told_what_only_that_one_needs(
    tmp_path: Path, host: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "is_root", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name, path=None: None if name == "newuidmap" else name)
    monkeypatch.setattr(host, "require", lambda *tools: Host.require(host, *(t for t in tools if t[0] != "/")))
    with pytest.raises(HostNotReady, match="newuidmap") as caught:
        make(tmp_path, host)
    assert caught.value.hint == "apt-get install -y uidmap"
    assert host.ran == ["unshare"]  # to see whether that is allowed at all


def test_of_two_builds_at_once_one_does_the_work(tmp_path: Path, host: Pretender) -> None:
    entered, waiting = threading.Event(), threading.Event()
    results: list[Image] = []

    def second(step: str, _part: float | None) -> None:
        if step == "waiting for another build":
            waiting.set()

    def hold() -> None:
        entered.set()
        assert waiting.wait(30)

    host.during_base = hold
    other = threading.Thread(target=lambda: results.append(make(tmp_path, host)))
    other.start()
    assert entered.wait(30)
    results.append(build(RECIPE, tmp_path, host=host, progress=second))
    other.join()
    assert results[0] == results[1]
    assert host.ran.count("mmdebstrap") == 1


def test_trouble_with_files_is_one_kind_of_error(tmp_path: Path, host: Pretender) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineFailed, match="could not be made") as caught:
        make(tmp_path / "file" / "images", host)
    assert caught.value.hint


def test_the_pointer_is_readable_json(tmp_path: Path, host: Pretender) -> None:
    image = make(tmp_path, host)
    assert json.loads((tmp_path / "default.json").read_text()) == {"directory": image.directory.name}
    assert (tmp_path / "default.json").stat().st_mode & 0o777 == 0o644
