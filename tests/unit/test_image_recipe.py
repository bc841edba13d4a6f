"""Digests of recipes: the same inputs give the same digest, any other input another one."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

import capsem
from capsem.image import recipe as recipes
from capsem.image.recipe import PROFILES, Recipe, for_machine, for_this_machine, guest_files
from capsem.model.errors import InvalidInput, NotFound

OTHER = {
    "name": "other",
    "suite": "forky",
    "architecture": "riscv64",
    "variant": "minbase",
    "packages": ("bash",),
    "kernel_package": "linux-image-amd64",
    "early_modules": ("erofs",),
    "late_modules": ("dummy",),
    "volume_mb": 1024,
    "kernel_command_line": "rw",
    "format_version": 99,
}


def test_digest_is_stable() -> None:
    assert Recipe().digest() == Recipe().digest() == replace(Recipe(suite="x"), suite="trixie").digest()


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_every_field_counts(field: str) -> None:
    assert replace(Recipe(), **{field: OTHER[field]}).digest() != Recipe().digest()


@pytest.mark.parametrize("path", ["guest/agent.py", "wire/frames.py", "image/guestfs/init", "image/rootfs.py"])
def test_code_counts(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = for_this_machine().digest()
    changed = Path(capsem.__file__).parent / path
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read_bytes(self) + (b"\n#" if self == changed else b""))
    assert for_this_machine().digest() != before


def test_the_base_depends_on_packages_and_mirror_alone() -> None:
    same = replace(Recipe(), volume_mb=1024, kernel_command_line="rw", late_modules=())
    assert same.base_digest(None, "") == Recipe().base_digest(None, "")
    others = [
        replace(Recipe(), packages=("bash",)).base_digest(None, ""),
        replace(Recipe(), suite="forky").base_digest(None, ""),
        Recipe().base_digest("a mirror", ""),
        Recipe().base_digest(None, "another procedure"),
    ]
    assert len({Recipe().base_digest(None, ""), *others}) == 5


def test_the_agent_is_all_there_and_alone() -> None:
    files = guest_files()
    assert {"capsem/__init__.py", "capsem/guest/__main__.py", "capsem/wire/frames.py", "agent.py", "init"} <= {*files}
    assert not [
        path
        for path in files
        if path.startswith("capsem/") and path.split("/")[1] not in {"__init__.py", "guest", "wire"}
    ]
    assert not [path for path in files if "__pycache__" in path]


def test_scripts_of_the_guest_hold_together() -> None:
    files = {path: data.decode() for path, data in guest_files().items()}
    assert files["init"].startswith("#!/usr/lib/capsem/busybox sh\n")
    assert files["initramfs-init.sh"].startswith("#!/bin/busybox sh\n")
    assert "/usr/lib/capsem/init" in files["initramfs-init.sh"]
    for line in files["mounts"].splitlines():
        assert len(line.split()) == 6


def test_power_off_status_is_the_agents() -> None:
    from capsem.guest.system import POWER_OFF_STATUS

    assert f"\npower_off={POWER_OFF_STATUS} " in guest_files()["init"].decode()


def test_machines_get_their_kernel() -> None:
    assert for_machine("x86_64").kernel_package == "linux-image-cloud-amd64"
    assert for_machine("aarch64").kernel_package == "linux-image-cloud-arm64"
    assert for_machine("aarch64").architecture == "arm64"


def test_profiles_differ_in_name_and_packages_alone() -> None:
    default, code = for_machine("x86_64"), for_machine("x86_64", "code")
    assert {key for key, value in default.to_dict().items() if code.to_dict()[key] != value} == {"name", "packages"}
    assert {*default.packages, "gcc", "nodejs", "npm", "python3-pip"} <= {*code.packages}
    assert [*PROFILES] == ["default", "code"]
    with pytest.raises(NotFound) as caught:
        for_machine("x86_64", "cobol")
    assert caught.value.hint == "there are: default, code"


def test_to_dict_is_what_json_gives_back() -> None:
    assert json.loads(json.dumps(for_this_machine().to_dict())) == for_this_machine().to_dict()


def test_a_name_that_is_no_file_name_is_refused() -> None:
    with pytest.raises(InvalidInput):
        Recipe(name="../x")


def test_hardening_of_the_contract_is_on_the_command_line() -> None:
    assert {"ro", "init_on_alloc=1", "slab_nomerge", "page_alloc.shuffle=1"} <= {
        *for_this_machine().kernel_command_line.split()
    }


def test_makers_exist() -> None:
    assert all((Path(recipes.__file__).parent / name).is_file() for name in recipes._MAKERS)
