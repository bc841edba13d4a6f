"""Which drivers there are; each is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path

from capsem.hypervisor.driver import Driver
from capsem.model.errors import InvalidInput


def make_driver(name: str, run_dir: Path) -> Driver:
    """The driver of that name; `run_dir` is where it may cache what it learns of the host. Raises InvalidInput."""
    if name == "qemu":
        from capsem.hypervisor.qemu.driver import QemuDriver

        return QemuDriver(run_dir / "cache")
    raise InvalidInput(f"no hypervisor driver is named {name[:40]!r}", hint="CAPSEM_HYPERVISOR may be: qemu")
