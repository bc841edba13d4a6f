"""`capsem image`, with images made of a few bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

import capsem.cli.image as image_commands
from capsem.api.vm_types import PrepareRequest
from capsem.cli.main import main
from capsem.image import manifest as manifests
from capsem.image.catalog import Image, open_image, write_pointer
from capsem.image.manifest import ROLES, Manifest
from capsem.image.recipe import Recipe, for_this_machine
from capsem.model.errors import HostNotReady
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.store import records
from capsem.store.layout import Layout
from contract.fake_service import fake_service


def make_image(images: Path, name: str = "default", content: bytes = b"x") -> Path:
    directory = images / "new"
    directory.mkdir(parents=True)
    for file in ROLES.values():
        (directory / file).write_bytes(content + file.encode())
    manifest = Manifest(
        name=name,
        architecture="amd64",
        recipe={},
        recipe_digest="0" * 64,
        kernel_version="6.12",
        kernel_command_line="ro",
        packages={},
        files={
            role: manifests.describe(directory / file, sparse=role in manifests.SPARSE) for role, file in ROLES.items()
        },
        created_at=1_700_000_000.0,
    )
    (directory / manifests.NAME).write_bytes(manifest.to_json())
    final = images / f"{name}-{manifest.digest[:12]}"
    directory.rename(final)
    write_pointer(images, name, final)
    return final


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in ("CAPSEM_LOG", "RUST_LOG", "CAPSEM_ASSETS_DIR"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("CAPSEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    return tmp_path / "home" / "assets"


def test_list(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "list"]) == 0
    assert capsys.readouterr().out == "No images.\n"
    directory = make_image(images)
    digest = open_image(directory).digest
    assert main(["image", "list"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "DIGEST", "SIZE", "BUILT", "DIRECTORY"]
    assert row.split() == ["default", digest[:12], "0M", "2023-11-14", str(directory)]
    assert main(["image", "list", "--json"]) == 0
    [described] = json.loads(capsys.readouterr().out)
    assert (described["digest"], described["kernel_version"]) == (digest, "6.12")


def test_another_directory(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image(tmp_path / "mine", "mine")
    assert main(["image", "--assets-dir", str(tmp_path / "mine"), "list"]) == 0
    assert str(tmp_path / "mine" / "mine-") in capsys.readouterr().out
    assert not images.exists()


def test_verify_and_remove(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_image(images)
    assert main(["image", "verify"]) == 0
    assert capsys.readouterr().out.endswith(" ok\n")
    (directory / ROLES["root"]).write_bytes(b"y" + ROLES["root"].encode())
    assert main(["image", "verify", "default"]) == 1
    assert ROLES["root"] in capsys.readouterr().err
    assert main(["image", "rm", "default"]) == 0
    assert capsys.readouterr().out.endswith(" removed\n")
    assert main(["image", "rm", "default"]) == 1
    assert main(["image", "verify", "../x"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_an_image_in_use_stays(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_image(images)
    layout = Layout(tmp_path / "home" / "run")
    layout.create()
    session = layout.session("box", persistent=True)
    session.path.mkdir()
    digest = open_image(directory).digest
    spec = VmSpec(1, 512, 1024, MappingProxyType({}))
    records.write(session, VmRecord("box", True, spec, "default", digest, (), 0.0))
    assert main(["image", "rm", "default"]) == 1
    err = capsys.readouterr().err
    assert f"error: the image {directory.name} is in use by box\nhint: " in err
    assert open_image(directory).digest == digest
    session.record.write_text("{")
    assert main(["image", "rm", "default"]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["image", "rm", "default", "--force"]) == 0
    assert not directory.exists()


def test_an_image_is_not_in_use_by_vms_of_another_one(images: Path, tmp_path: Path) -> None:
    directory = make_image(images)
    layout = Layout(tmp_path / "home" / "run")
    layout.create()
    session = layout.session("box", persistent=False)
    session.path.mkdir()
    spec = VmSpec(1, 512, 1024, MappingProxyType({}))
    records.write(session, VmRecord("box", False, spec, "default", "0" * 64, (), 0.0))
    assert main(["image", "rm", "default"]) == 0
    assert not directory.exists()


def test_build(images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[object] = []

    def build(
        recipe: Recipe,
        images_dir: Path,
        *,
        mirror: str | None,
        force: bool,
        progress: Callable[[str, float | None], None],
    ) -> object:
        asked.append((recipe, mirror, force))
        for step, fraction in (("fetching", 0.0), ("fetching", 0.5), ("packing", None)):
            progress(step, fraction)
        return open_image(make_image(images_dir))

    monkeypatch.setattr(image_commands, "build", build)
    assert main(["image", "--assets-dir", str(images), "build", "--mirror", "http://m", "--force"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "fetching\npacking\n"
    assert shown.out.startswith("default ")
    assert f" is up to date: {images}/default-" in shown.out
    assert asked == [(for_this_machine(), "http://m", True)]


def test_a_service_that_runs_is_told_of_the_image(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_commands, "build", lambda _recipe, to, **_options: open_image(make_image(to, "code")))
    with fake_service() as service:
        argv = ["--uds-path", str(service.path), "image", "--assets-dir", str(images), "build", "--profile", "code"]
        assert main(argv) == 0
        assert service.manager.requests == [PrepareRequest(profile="code")]
    assert "template" in capsys.readouterr().err


def test_a_build_clears_up_after_itself_and_prune_after_all(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, other = make_image(images, content=b"1"), make_image(images, "code", b"1")
    make_image(images, "code", b"2")
    contents = iter((b"2", b"3"))

    def build(_recipe: Recipe, images_dir: Path, **_options: object) -> Image:
        image = open_image(make_image(images_dir, content=next(contents)))
        return replace(image, manifest=replace(image.manifest, created_at=time.time()))

    monkeypatch.setattr(image_commands, "build", build)
    assert main(["image", "--assets-dir", str(images), "build"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"default {old.name[-12:]} removed"
    assert other.exists()
    assert not old.exists()
    assert main(["image", "--assets-dir", str(images), "prune"]) == 0
    assert capsys.readouterr().out == f"code {other.name[-12:]} removed\n"
    assert main(["image", "--assets-dir", str(images), "prune"]) == 0
    assert capsys.readouterr().out == "Nothing to remove.\n"

    # Where it is not sure whether a VM needs it, an old one stays; that is no failure of the build.
    session = Layout(tmp_path / "home" / "run").session("box", persistent=True)
    session.path.mkdir(parents=True)
    session.record.write_text("{")
    assert main(["image", "--assets-dir", str(images), "build"]) == 0
    assert "note: older images stay: box may need the image" in capsys.readouterr().err
    assert len([*images.glob("default-*")]) == 2


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (HostNotReady("no mmdebstrap", hint="apt-get install it"), "no mmdebstrap"),
        (OSError(28, "No space left"), "No space left"),
    ],
)
def test_a_build_that_fails(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, says: str
) -> None:
    def build(*_args: object, **_options: object) -> object:
        raise error

    monkeypatch.setattr(image_commands, "build", build)
    assert main(["image", "build"]) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert says in err
