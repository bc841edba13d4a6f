"""The log's lines, levels and files."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem import log
from capsem.log import JsonFormatter, RotatingHandler, levels, trace


@pytest.fixture
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if handler not in before:
            handler.close()
    for handler in before:
        root.addHandler(handler)
    root.setLevel(level)
    for target in (*log.TARGETS, "capsem_service.http"):
        logging.getLogger(target).setLevel(logging.NOTSET)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("logging_restored")
def test_a_line(tmp_path: Path) -> None:
    path = tmp_path / "service.log"
    log.setup({}, path)
    speaker = logging.getLogger("capsem_service.http")
    speaker.info("hello %s", "wörld\nnext", extra={"fields": {"pages": 3, "path": path}})
    speaker.debug("not this")
    logging.getLogger("some.library").info("nor this")
    logging.getLogger("some.library").warning("but this")
    try:
        raise ValueError("inside")
    except ValueError:
        speaker.exception("it broke")
    first, second, third = lines(path)
    assert first.pop("timestamp", "").endswith("Z")  # type: ignore[attr-defined]
    assert first == {
        "level": "INFO",
        "target": "capsem_service.http",
        "message": "hello wörld\nnext",
        "fields": {"pages": 3, "path": str(path)},
    }
    assert (second["level"], second["target"]) == ("WARN", "some.library")
    assert "ValueError: inside" in str(third["exception"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_time_is_utc_and_iso() -> None:
    record = logging.LogRecord("capsem", logging.INFO, "", 0, "x", (), None)
    record.created = 1_700_000_000.25
    assert json.loads(JsonFormatter().format(record))["timestamp"] == "2023-11-14T22:13:20.250000Z"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"capsem_service": logging.INFO, "capsem_process": logging.INFO}),
        ({"RUST_LOG": "debug"}, {"capsem_service": logging.DEBUG, "capsem_process": logging.DEBUG}),
        ({"RUST_LOG": "WARN"}, {"capsem": logging.WARNING}),
        ({"RUST_LOG": "capsem=debug"}, {"capsem_service": logging.DEBUG}),
        ({"RUST_LOG": "nonsense,,=,a=b=c"}, {"capsem_service": logging.INFO}),
        ({"RUST_LOG": "", "CAPSEM_LOG": "error"}, {"capsem_service": logging.ERROR}),
        ({"RUST_LOG": "error", "CAPSEM_LOG": "debug"}, {"capsem_service": logging.ERROR}),
        (
            {"CAPSEM_LOG": "warn, capsem_service::http=trace"},
            {"capsem_service.http": logging.DEBUG, "capsem": logging.WARNING},
        ),
        ({"RUST_LOG": "off"}, {"capsem_process": logging.CRITICAL + 10}),
    ],
)
def test_levels(environ: dict[str, str], expected: dict[str, int]) -> None:
    found = levels(environ)
    assert {target: found.get(target) for target in expected} == expected


def test_rotation_keeps_a_bounded_number_of_bounded_files(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    handler = RotatingHandler(path, max_bytes=100, files=3)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for n in range(60):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {n:04}", (), None))
    handler.close()
    files = sorted(each.name for each in tmp_path.iterdir())
    assert files == ["x.log", "x.log.1", "x.log.2"]
    assert all(each.stat().st_size <= 100 for each in tmp_path.iterdir())
    kept = "".join((tmp_path / name).read_text() for name in ("x.log.2", "x.log.1", "x.log")).split("\n")
    assert kept[:-1] == [f"line {n:04}" for n in range(60 - len(kept) + 1, 60)]


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    for text in ("one", "two"):
        handler = RotatingHandler(path)
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, text, (), None))
        handler.close()
    assert path.read_text() == "one\ntwo\n"


def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x.log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        RotatingHandler(tmp_path / "x.log")


@pytest.mark.usefixtures("logging_restored")
def test_setting_up_again_replaces_the_handler(tmp_path: Path) -> None:
    log.setup({}, tmp_path / "a.log")
    log.setup({}, tmp_path / "b.log")
    logging.getLogger("capsem").info("x")
    assert lines(tmp_path / "a.log") == []
    assert len(lines(tmp_path / "b.log")) == 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


def records(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, dict[str, object]]]:
    return [(record.levelname, record.getMessage(), record.fields) for record in caplog.records]  # type: ignore[attr-defined]


def test_trace_logs_a_pair(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with trace("suspend.write_memory", clock=Clock(), pages=2) as work:
        work.fields["bytes"] = 9
    assert records(caplog) == [
        ("DEBUG", "suspend.write_memory.started", {"pages": 2}),
        ("INFO", "suspend.write_memory.complete", {"pages": 2, "bytes": 9, "duration_ms": 250.0}),
    ]


def test_trace_of_a_failure_passes_the_error_on(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with trace("x", logging.getLogger("capsem_process.boot"), clock=Clock()):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(work())
    assert records(caplog)[-1] == ("WARNING", "x.failed", {"duration_ms": 250.0, "error": "ValueError('no')"})
    assert caplog.records[-1].name == "capsem_process.boot"
