"""What an image says of itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsem.image import manifest as manifests
from capsem.image.manifest import ROLES, File, Manifest, describe
from capsem.model.errors import Corrupt

MANIFEST = Manifest(
    name="default",
    architecture="amd64",
    recipe={"name": "default"},
    recipe_digest="r" * 64,
    kernel_version="6.12.1",
    kernel_command_line="ro quiet",
    packages={"bash": "5.2"},
    files={role: File(name, 10, f"sha256:{role}") for role, name in ROLES.items()},
    created_at=1.5,
)


def write(path: Path, **changes: Any) -> Path:
    body = json.loads(MANIFEST.to_json()) | changes
    path.write_text(json.dumps(body))
    return path


def test_written_and_read_it_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(MANIFEST.to_json())
    assert manifests.read(tmp_path / "m") == MANIFEST


def test_digest_is_of_what_the_guest_gets() -> None:
    assert replace(MANIFEST, created_at=9.0, recipe_digest="", packages={}).digest == MANIFEST.digest
    assert replace(MANIFEST, kernel_command_line="rw").digest != MANIFEST.digest
    other = {**MANIFEST.files, "root": File("root.erofs", 10, "sha256:other")}
    assert replace(MANIFEST, files=other).digest != MANIFEST.digest


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused_with_the_way_out(tmp_path: Path, version: object) -> None:
    with pytest.raises(Corrupt, match=r"capsem image build") as caught:
        manifests.read(write(tmp_path / "m", format_version=version))
    assert "format" in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "0" * 64},
        {"files": {}},
        {"files": {role: {"name": "../../etc/passwd", "size": 10, "digest": f"sha256:{role}"} for role in ROLES}},
        {"files": {role: {"name": "..", "size": 10, "digest": f"sha256:{role}"} for role in ROLES}},
        {"files": [1]},
        {"files": {role: {"name": 3, "size": 10, "digest": "x"} for role in ROLES}},
        {"unknown": 1},
    ],
)
def test_what_does_not_agree_with_itself_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(Corrupt):
        manifests.read(write(tmp_path / "m", **changes))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"\xff", b"{"])
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(Corrupt):
        manifests.read(tmp_path / "m")


def test_a_missing_manifest_is_the_callers_business(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        manifests.read(tmp_path / "m")


def test_digest_of_a_plain_file_is_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    assert describe(tmp_path / "f") == File("f", 7, "sha256:" + hashlib.sha256(b"content").hexdigest())


pieces = st.lists(st.tuples(st.booleans(), st.integers(1, 200_000)), max_size=5)


@settings(max_examples=40, deadline=None)
@given(pieces)
def test_a_copy_without_holes_is_still_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, layout: list[tuple[bool, int]]
) -> None:
    directory = tmp_path_factory.mktemp("sparse")
    with (directory / "f").open("wb") as file:
        for data, size in layout:
            if data:
                file.write(b"d" * size)
            else:
                file.seek(size, 1)
        file.truncate()
    sparse = describe(directory / "f", sparse=True)
    content = (directory / "f").read_bytes()
    (directory / "f").write_bytes(content)
    assert describe(directory / "f", sparse=True) == sparse
    if content.strip(b"\0"):
        (directory / "f").write_bytes(content.replace(b"d", b"e", 1))
        assert describe(directory / "f", sparse=True) != sparse


def test_holes_cost_nothing(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 40)  # hashing this would take an hour
    assert describe(tmp_path / "f", sparse=True).size == 1 << 40
