"""The examples of the documentation, typed line by line into a shell, on real VMs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from real_service import BIN, Service

ROOT = Path(__file__).parent.parent.parent
PAGES = ("quickstart.md", "guides.md")


def examples(page: str) -> list[tuple[str, list[str]]]:
    """Command lines and the lines that they are said to show."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def pattern(lines: list[str]) -> str:
    """What output has to match: a line "..." is any lines, " ... " within one anything."""
    parts = []
    for line in lines:
        if line.strip() == "...":
            parts.append(r"(.*\n)*")
        else:
            parts.append(r"\s*.*?\s*".join(re.escape(part.strip()) for part in line.split("...")) + r"[^\n]*\n")
    return "".join(parts)


@pytest.mark.parametrize("page", PAGES)
def test_examples(own_service: Service, tmp_path: Path, page: str) -> None:
    env = {**own_service.env, "PATH": f"{BIN}:{own_service.env['PATH']}"}
    lines = examples(page)
    assert len(lines) > 10
    for command, expected in lines:
        ran = subprocess.run(
            ["bash", "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=180
        )
        assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
        assert re.fullmatch(pattern(expected), ran.stdout), (command, ran.stdout, expected)
