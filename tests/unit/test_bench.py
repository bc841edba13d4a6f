"""What makes figures readable: order of measurements, ratios, the page and its pictures."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from bench import report
from bench.host import in_turn
from bench.table import Row, show

MACHINE = {
    "cpus": "2 x Some CPU",
    "memory_gib": 4.0,
    "kernel": "6.1",
    "python": "3.11",
    "qemu": "7.2",
    "accelerator": "tcg",
}


def result(*rows: Row, refused: dict[str, str] | None = None) -> dict[str, object]:
    return {
        "when": "2026-01-01",
        "seconds": 3,
        "machine": MACHINE,
        "load": [0.5, 1.5],
        "refused": refused or {},
        "rows": [row.to_json() for row in rows],
    }


def test_contestants_take_turns_and_none_is_always_first() -> None:
    said: list[str] = []

    def step(name: str) -> float:
        said.append(name)
        return len(said)

    found = in_turn(3, {"a": lambda: step("a"), "b": lambda: step("b")})
    assert said == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_a_row_survives_being_written() -> None:
    row = Row("x (ms)", [3.0, 1.0, 2.0], [1.0], "2 x", {"peer": [9.0]})
    assert Row.from_json(row.to_json()) == row
    assert row.ratio == 2
    assert "2.0 (1.0-3.0)" in show([row])
    assert "peer 9.0" in show([row])


def test_the_page_has_what_was_measured_and_who_could_not_take_part() -> None:
    found = {
        "boots": result(
            Row("exec true (ms)", [30.0, 40.0], [20.0], "1.5 x", {"one": [90.0]}), refused={"two": "no image"}
        )
    }
    text = report.page(found)
    assert "| exec true (ms) | 35.0 (30.0-40.0) | 20.0 (20.0-20.0) | 1.75 | 1.5 x | 90.0 (90.0-90.0) |" in text
    assert "- two could not take part: no image" in text
    assert "load 0.5 to 1.5" in text


def test_pictures_are_svg_and_show_each_ratio() -> None:
    pause = "pause of a checkpoint, 2048 MiB, %d MB changed since a cold boot (ms)"
    found = {
        "boots": result(Row("a < b (ms)", [30.0], [20.0])),
        "pauses": result(Row(pause % 0, [20.0], [10.0]), Row(pause % 100, [60.0], [40.0])),
        "density": result(Row("PSS of each QEMU, 1 VMs (MB)", [100.0]), Row("PSS of each QEMU, 10 VMs (MB)", [50.0])),
    }
    drawn = report.pictures(found)
    assert set(drawn) == {"ratios", "pauses", "memory"}
    texts = {name: [*ET.fromstring(svg).itertext()] for name, svg in drawn.items()}
    assert "a < b (ms)" in texts["ratios"]
    assert "1.50" in texts["ratios"]
    assert "QEMU alone" in texts["pauses"]
    for name in drawn:
        assert f"benchmarks/{name}.svg" in report.page(found)
