"""Where images are looked for, and which one a name means. The images are a few bytes each."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from capsem.image import manifest as manifests
from capsem.image.catalog import Catalog, Image, open_image, read_pointer, write_pointer
from capsem.image.manifest import ROLES, SPARSE, Manifest
from capsem.model.errors import Corrupt, NotFound, WrongState
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.store import records
from capsem.store.layout import Layout, SessionDir


def fill(directory: Path, name: str, content: bytes) -> Manifest:
    """Put an image into a directory."""
    directory.mkdir(parents=True)
    for role, file in ROLES.items():
        (directory / file).write_bytes(content + role.encode())
    manifest = Manifest(
        name=name,
        architecture="amd64",
        recipe={},
        recipe_digest="",
        kernel_version="6.12",
        kernel_command_line="ro",
        packages={},
        files={role: manifests.describe(directory / file, sparse=role in SPARSE) for role, file in ROLES.items()},
        created_at=0.0,
    )
    (directory / manifests.NAME).write_bytes(manifest.to_json())
    return manifest


def add(images: Path, name: str = "default", content: bytes = b"x", *, current: bool = True) -> Image:
    """Add an image to an images directory, as a build does."""
    manifest = fill(images / "new", name, content)
    place = (images / "new").rename(images / f"{name}-{manifest.digest[:12]}")
    if current:
        write_pointer(images, name, place)
    return open_image(place)


def add_vm(run_dir: Path, vm_id: str, digest: str) -> SessionDir:
    """A VM's record in a run directory, which is made if it is not there."""
    layout = Layout(run_dir)
    layout.create()
    session = layout.session(vm_id, persistent=True)
    session.path.mkdir()
    records.write(session, VmRecord(vm_id, True, VmSpec(1, 512, 1024), "default", digest, (), 0.0))
    return session


def test_finds_the_current_one_by_name_and_any_by_its_directory(tmp_path: Path) -> None:
    catalog = Catalog([tmp_path], tmp_path)
    old, new = add(tmp_path, content=b"old"), add(tmp_path, content=b"new")
    assert catalog.find() == catalog.find("default") == new
    assert catalog.find(old.directory.name) == old
    assert catalog.find_digest(old.digest) == old
    assert {image.digest for image in catalog.list()} == {old.digest, new.digest}
    assert new.kernel.read_bytes() == b"newkernel"
    assert new.kernel_command_line == "ro"


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    catalog = Catalog([tmp_path / "missing", tmp_path], tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "plain-file").write_bytes(b"")
    assert catalog.list() == []
    with pytest.raises(NotFound, match="capsem image build"):
        catalog.find()
    with pytest.raises(NotFound):
        catalog.find_digest("0" * 64)


def test_the_first_directory_that_has_it_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    other = add(second, content=b"second")
    catalog = Catalog([first, second], first)
    assert catalog.find() == other
    mine = add(first, content=b"first")
    assert catalog.find() == mine
    assert catalog.list() == [mine, other]


def test_a_directory_can_be_an_image_or_hold_one_for_this_machine(tmp_path: Path) -> None:
    fill(tmp_path / "itself", "default", b"a")
    fill(tmp_path / "assets" / platform.machine(), "default", b"b")
    for directory in (tmp_path / "itself", tmp_path / "assets"):
        catalog = Catalog([directory], directory)
        assert catalog.find().directory.is_relative_to(directory)
        assert catalog.list() == [catalog.find()]


def test_assets_of_other_programs_count_for_nothing(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("vmlinuz", "initrd.img", "rootfs.squashfs", "manifest.json"):
        (foreign / name).write_bytes(b"{}" if name.endswith("json") else b"not ours")
    mine = add(tmp_path / "mine")
    assert Catalog([foreign, tmp_path / "mine"], foreign).find() == mine


class TestEnvironment:
    def test_order(self, tmp_path: Path) -> None:
        environ = {"HOME": "/home/x", "CAPSEM_HOME": "/c", "CAPSEM_ASSETS_DIR": "/a"}
        catalog = Catalog.from_environment(environ, Path("/option"), prefix=tmp_path)
        expected = ["/option", "/a", str(tmp_path / "share/capsem"), "/c/assets"]
        assert [str(path) for path in catalog.directories] == expected

    def test_empty_values_count_as_unset(self, tmp_path: Path) -> None:
        environ = {"HOME": "/home/x", "CAPSEM_HOME": "", "CAPSEM_ASSETS_DIR": ""}
        catalog = Catalog.from_environment(environ, prefix=tmp_path)
        assert [str(path) for path in catalog.directories] == [str(tmp_path / "share/capsem"), "/home/x/.capsem/assets"]

    def test_without_a_home_the_users_own_is_taken(self, tmp_path: Path) -> None:
        assert Catalog.from_environment({}, prefix=tmp_path).directories[-1].parts[-2:] == (".capsem", "assets")

    def test_writes_beside_the_program_where_it_may(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        environ = {"CAPSEM_HOME": str(tmp_path / "home"), "CAPSEM_ASSETS_DIR": "/a"}
        assert Catalog.from_environment(environ, prefix=tmp_path).write_to == tmp_path / "share/capsem"
        assert Catalog.from_environment(environ, Path("/option"), prefix=tmp_path).write_to == Path("/option")
        monkeypatch.setattr("os.access", lambda *_: False)
        assert Catalog.from_environment(environ, prefix=tmp_path).write_to == tmp_path / "home/assets"


@pytest.mark.parametrize("role", ROLES)
def test_opening_checks_sizes(tmp_path: Path, role: str) -> None:
    image = add(tmp_path)
    path = image.directory / ROLES[role]
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(Corrupt, match=ROLES[role]):
        Catalog([tmp_path], tmp_path).find()
    path.unlink()
    with pytest.raises(Corrupt, match="is missing"):
        Catalog([tmp_path], tmp_path).find()
    assert Catalog([tmp_path], tmp_path).list() == []


@pytest.mark.parametrize("role", ROLES)
def test_verifying_checks_contents_and_names_the_file(tmp_path: Path, role: str) -> None:
    image = add(tmp_path)
    catalog = Catalog([tmp_path], tmp_path)
    catalog.verify(image)
    path = image.directory / ROLES[role]
    path.write_bytes(path.read_bytes()[::-1])
    assert catalog.find() == image  # of the same size: opening does not notice
    with pytest.raises(Corrupt, match=ROLES[role]):
        catalog.verify(image)


class TestRemoving:
    def test_a_name_takes_all_its_images(self, tmp_path: Path) -> None:
        images = [add(tmp_path, content=b"old"), add(tmp_path, content=b"new")]
        other = add(tmp_path, name="default-2")
        catalog = Catalog([tmp_path], tmp_path)
        assert {image.digest for image in catalog.remove("default", tmp_path / "run")} == {
            image.digest for image in images
        }
        assert catalog.list() == [other]
        assert {path.name for path in tmp_path.iterdir()} == {"default-2.json", other.directory.name}
        with pytest.raises(NotFound):
            catalog.remove("default", tmp_path / "run")

    def test_a_directory_name_takes_one(self, tmp_path: Path) -> None:
        old, new = add(tmp_path, content=b"old"), add(tmp_path, content=b"new")
        catalog = Catalog([tmp_path], tmp_path)
        assert catalog.remove(old.directory.name, tmp_path / "run") == [old]
        assert catalog.find() == new
        catalog.remove(new.directory.name, tmp_path / "run")
        assert read_pointer(tmp_path, "default") is None

    def test_an_image_in_use_stays_and_so_do_its_siblings(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        old, new = add(images, content=b"old"), add(images, content=b"new")
        add_vm(tmp_path / "run", "vm1", old.digest)
        catalog = Catalog([images], images)
        with pytest.raises(WrongState, match="in use by vm1"):
            catalog.remove("default", tmp_path / "run")
        assert catalog.find() == new
        assert catalog.find_digest(old.digest) == old
        assert len(catalog.remove("default", tmp_path / "run", force=True)) == 2

    def test_damaged_images_can_be_removed(self, tmp_path: Path) -> None:
        image = add(tmp_path)
        (image.directory / manifests.NAME).write_bytes(b"{")
        assert Catalog([tmp_path], tmp_path).remove("default", tmp_path / "run") == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["..", "../x", "", "cache", ".", "default.json"])
    def test_names_lead_nowhere_else(self, tmp_path: Path, name: str) -> None:
        add(tmp_path / "images")
        (tmp_path / "images" / "cache").mkdir()
        (tmp_path / "x").mkdir()
        with pytest.raises(NotFound):
            Catalog([tmp_path / "images"], tmp_path).remove(name, tmp_path / "run")
        assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"directory": 3}',
        '{"directory": "../default-000000000000"}',
        '{"directory": ""}',
        '{"directory": ".."}',
    ],
)
def test_a_damaged_pointer_points_nowhere(tmp_path: Path, text: str) -> None:
    (tmp_path / "default.json").write_text(text)
    assert read_pointer(tmp_path, "default") is None
    with pytest.raises(NotFound):
        Catalog([tmp_path], tmp_path).find()
