"""Finding QEMU and reading what it says. Spawning is shown in tests/vm."""

from __future__ import annotations

from pathlib import Path

import pytest

from capsem.hypervisor.qemu.process import complaint, find_qemu, lacking_features, parse_version
from capsem.model.errors import HostNotReady


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", "7.2.22"),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", "10.0.2"),
        ("QEMU emulator version 8.2 (x)", "8.2.0"),
    ],
)
def test_versions(text: str, version: str) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["QEMU emulator version 7.1.0", "QEMU emulator version 5.2.0", "hello", ""])
def test_versions_that_will_not_do(text: str) -> None:
    with pytest.raises(HostNotReady) as caught:
        parse_version(text)
    assert caught.value.hint


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_qemu_is_found_by_name_or_by_setting(tmp_path: Path) -> None:
    installed = executable(tmp_path / "qemu-system-x86_64")
    other = executable(tmp_path / "my-qemu")
    assert find_qemu({"PATH": str(tmp_path)}) == installed
    assert find_qemu({"PATH": str(tmp_path), "CAPSEM_QEMU": str(other)}) == other


@pytest.mark.parametrize(
    "environ", [{"PATH": "/nonexistent"}, {"PATH": "/usr/bin", "CAPSEM_QEMU": "/nonexistent/qemu"}]
)
def test_without_qemu_the_hint_says_what_to_install(environ: dict[str, str]) -> None:
    with pytest.raises(HostNotReady) as caught:
        find_qemu(environ)
    assert "apt install" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("", ""),
        ("qemu-system-x86_64: warning: something odd\n", ""),
        ("qemu-system-x86_64: warning: odd\nqemu-system-x86_64: -m 1P: too much\n", "-m 1P: too much"),
        ('qemu-system-x86_64: -blockdev {"driver":"file","x":{}}: Could not open \'/a\': No such file', None),
        (
            'qemu-system-x86_64: -device x: Failed to get "write" lock\nIs another process using the image [/a]?\n',
            '-device x: Failed to get "write" lock',
        ),
    ],
)
def test_complaints(stderr: str, said: str | None) -> None:
    assert complaint(stderr) == ("Could not open '/a': No such file" if said is None else said)


def test_lacking_features() -> None:
    stderr = (
        "qemu-system-x86_64: warning: host doesn't support requested feature: CPUID.01H:ECX.sse4.1 [bit 19]\n"
        "qemu-system-x86_64: warning: TCG doesn't support requested feature: CPUID.07H:EBX.avx2 [bit 5]\n"
    )
    assert lacking_features(stderr) == ["avx2", "sse4.1"]
    assert lacking_features("all is well") == []
