"""A caller's type checker sees what the SDK takes and gives, and refuses what it does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).parent / "sdk_sample.py"
ROOT = SAMPLE.parent.parent.parent


def test_the_sample_is_judged_as_it_says(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--no-error-summary",
            "--hide-error-context",
            "--config-file=",
            SAMPLE,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    found = {
        (int(line), code)
        for line, code in re.findall(r"^\S+:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    }
    lines = SAMPLE.read_text().splitlines()
    wanted = {
        (number, code[1]) for number, line in enumerate(lines, 1) if (code := re.search(r"# error: ([a-z-]+)$", line))
    }
    assert len(wanted) > 8
    assert found == wanted, done.stdout
