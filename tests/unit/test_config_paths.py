"""Settings and paths."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem import config
from capsem.config import SETTINGS, Paths
from capsem.model import spec
from capsem.model.errors import InvalidInput


def env(home: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(home), **more}


def write(home: Path, text: str) -> Path:
    (home / ".capsem").mkdir(exist_ok=True)
    path = home / ".capsem" / "config.toml"
    path.write_text(text)
    return path


def test_the_table_fits_the_model() -> None:
    rows = {row.name: row for row in SETTINGS}
    assert rows["vm.resources.ram_gb"].default * 1024 == spec.DEFAULT_RAM_MB
    assert rows["vm.resources.ram_gb"].low * 1024 == spec.RAM_MB.start
    assert rows["vm.resources.ram_gb"].high * 1024 == spec.RAM_MB.stop - 1
    assert rows["vm.resources.cpu_count"].default == spec.DEFAULT_CPUS
    assert rows["vm.resources.cpu_count"].high == spec.CPUS.stop - 1
    assert len({row.env for row in SETTINGS}) == len(rows) == len(SETTINGS)
    assert all(row.help and row.check(row.default, "") == row.default for row in SETTINGS)


def test_without_files_the_defaults_hold(tmp_path: Path) -> None:
    settings = config.load(env(tmp_path))
    assert (settings.max_concurrent_vms, settings.ram_mb, settings.cpu_count) == (10, 4096, 4)
    assert settings.warnings == ()
    assert settings == config.Settings()


def test_the_user_s_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'x = 1\n[vm.resources]\nram_gb = 0.5\ncpu_count = 2\nvm_count = 3\n[other]\ny = "z"\n')
    settings = config.load(env(tmp_path))
    assert (settings.max_concurrent_vms, settings.ram_mb, settings.cpu_count) == (10, 512, 2)
    assert settings.warnings == tuple(
        f"{path}: there is no setting {name}; it is ignored" for name in ("x", "vm.resources.vm_count", "other.y")
    )


@pytest.mark.parametrize("value", ["pause", "Stop", "", 1])
def test_what_becomes_of_vms_when_the_service_stops(tmp_path: Path, value: object) -> None:
    assert config.load(env(tmp_path)).on_service_stop == "suspend"
    assert config.load(env(tmp_path, CAPSEM_ON_SERVICE_STOP="keep")).on_service_stop == "keep"
    write(tmp_path, 'vm.on_service_stop = "keep"')
    assert config.load(env(tmp_path)).on_service_stop == "keep"
    write(tmp_path, f"vm.on_service_stop = {value!r}")
    with pytest.raises(InvalidInput, match="one of: suspend, stop, keep"):
        config.load(env(tmp_path))


def test_who_overrides_whom(tmp_path: Path) -> None:
    write(tmp_path, "vm.resources.cpu_count = 1\nvm.resources.ram_gb = 1\nvm.resources.max_concurrent_vms = 1")
    corporate = tmp_path / "corp.toml"
    corporate.write_text("vm.resources.max_concurrent_vms = 3")
    settings = config.load(
        env(
            tmp_path,
            CAPSEM_CORP_CONFIG=str(corporate),
            CAPSEM_MAX_CONCURRENT_VMS="2",
            CAPSEM_RAM_GB="2",
            CAPSEM_CPU_COUNT="",
        )
    )
    assert (settings.cpu_count, settings.ram_mb, settings.max_concurrent_vms) == (1, 2048, 3)


def test_another_file(tmp_path: Path) -> None:
    write(tmp_path, "vm.resources.cpu_count = 1")
    other = tmp_path / "other.toml"
    other.write_text("vm.resources.cpu_count = 7")
    assert config.load(env(tmp_path, CAPSEM_USER_CONFIG=str(other))).cpu_count == 7
    assert config.load(env(tmp_path, CAPSEM_USER_CONFIG=str(tmp_path / "none"))).cpu_count == 4
    assert config.load(env(tmp_path, CAPSEM_USER_CONFIG="")).cpu_count == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vm.resources.cpu_count = 9", "vm.resources.cpu_count is 9"),
        ("vm.resources.cpu_count = 1.0", "vm.resources.cpu_count is 1.0"),
        ("vm.resources.cpu_count = true", "is True"),
        ('vm.resources.ram_gb = "4"', "is '4'"),
        ("vm.resources.ram_gb = nan", "is nan"),
        ("vm.resources.ram_gb = {}", "is {}"),
        ("vm.resources.max_concurrent_vms = 0", "is 0"),
        ("= 3", "cannot be read"),
    ],
)
def test_bad_values_name_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        config.load(env(tmp_path))
    assert str(path) in caught.value.message
    assert says in caught.value.message


def test_a_file_that_is_no_text_or_a_directory(tmp_path: Path) -> None:
    write(tmp_path, "").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot be read"):
        config.load(env(tmp_path))
    with pytest.raises(InvalidInput, match="cannot be read"):
        config.load(env(tmp_path, CAPSEM_USER_CONFIG=str(tmp_path)))


@pytest.mark.parametrize("text", ["x", "1.5", "nan", "inf", "-1", "1e3"])
def test_bad_environment_variables_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput, match="environment variable CAPSEM_CPU_COUNT"):
        config.load(env(tmp_path, CAPSEM_CPU_COUNT=text))


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_any_environment_is_a_number_or_invalid_input(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert 0.25 <= config.load({"HOME": "/nonexistent", "CAPSEM_RAM_GB": text}).ram_mb / 1024 <= 16


def test_where_things_are(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    assert Paths.from_environment(env(root)) == Paths(
        f"{root}/.capsem", f"{root}/.capsem/run", f"{root}/.capsem/run/service.sock"
    )
    assert Paths.from_environment(env(root, CAPSEM_HOME=str(root / "h"))).run_dir == root / "h/run"
    both = Paths.from_environment(env(root, CAPSEM_HOME=str(root / "h"), CAPSEM_RUN_DIR=str(root / "r")))
    assert (both.home, both.run_dir, both.uds_path) == (root / "h", root / "r", root / "r/service.sock")
    empty = env(root, CAPSEM_HOME="", CAPSEM_RUN_DIR="", CAPSEM_UDS_PATH="")
    assert Paths.from_environment(empty) == Paths.from_environment(env(root))
    told = Paths.from_environment(env(root, CAPSEM_UDS_PATH=str(root / "x.sock")))
    assert (told.uds_path, told.run_dir, told.explicit) == (root / "x.sock", root / ".capsem/run", False)
    named = Paths.from_environment(env(root, CAPSEM_RUN_DIR="/elsewhere"), root / "y.sock")
    assert (named.uds_path, named.run_dir, named.explicit) == (root / "y.sock", root, True)


def test_links_are_resolved_once(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    (root / "real").mkdir()
    (root / "link").symlink_to("real")
    assert Paths.from_environment(env(root / "link")).home == root / "real/.capsem"
    assert Paths.from_environment({"CAPSEM_HOME": str(root / "link")}).run_dir == root / "real/run"
    assert Paths.from_environment(env(root), root / "link/s.sock").uds_path == root / "real/s.sock"


def test_no_home_at_all() -> None:
    with pytest.raises(InvalidInput, match="HOME"):
        Paths.from_environment({"HOME": ""})
