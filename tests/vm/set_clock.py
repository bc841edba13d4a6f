"""Capsem's programs, on a host whose wall clock is what a file says.

The file holds the seconds that it is off, and may change. What the kernel's clock cannot be used for, since it is everybody's,
is done at the place where Capsem reads it: all else is the real program.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path

from capsem.system import real

PERIOD = 0.02  # seconds between looks at the file


class SetClock(real.RealClock):
    """The kernel's clocks, of which the wall clock is set."""

    file: Path

    def time(self) -> float:
        return super().time() + float(self.file.read_text())

    async def jumped(self) -> None:
        before = self.file.read_text()
        while self.file.read_text() == before:
            await asyncio.sleep(PERIOD)


def program(path: Path, module: str, file: Path) -> None:
    """Write an executable that is a program of Capsem's, `module`, with the clock of `file`."""
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        f"import set_clock\nset_clock.run({module!r}, {str(file)!r})\n"
    )
    path.chmod(0o700)


def run(module: str, file: str) -> None:
    SetClock.file = Path(file)
    real.RealClock = SetClock  # type: ignore[misc]
    sys.exit(importlib.import_module(module).main())
