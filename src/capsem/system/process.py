"""This process itself."""

from __future__ import annotations

from pathlib import Path


def set_process_name(name: str) -> None:
    """Set the name that process listings show (15 bytes at most); a script's is otherwise its interpreter's."""
    Path("/proc/self/comm").write_text(name, encoding="ascii")
