"""Which drivers there are; each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from capsem.hypervisor.driver import Driver
from capsem.model.errors import InvalidInput
from capsem.system import System


def load(name: str) -> None:
    """Import a driver ahead of its use. Raises InvalidInput."""
    if name == "qemu":
        import capsem.hypervisor.qemu.driver
    elif name == "sim":
        import capsem.hypervisor.sim.driver  # noqa: F401
    else:
        raise InvalidInput(f"no hypervisor driver is named {name[:40]!r}", hint="CAPSEM_HYPERVISOR may be: qemu, sim")


def make_driver(name: str, run_dir: Path, system: System, environ: Mapping[str, str]) -> Driver:
    """The driver of that name; `run_dir` is where it may cache what it learns of the host, CAPSEM_SIM in `environ` what
    the simulated one is to do (see its `plan`). Raises InvalidInput.
    """
    load(name)
    if name == "sim":
        from capsem.hypervisor.sim.driver import SimDriver
        from capsem.hypervisor.sim.plan import Plan

        return SimDriver(system, Plan.parse(environ.get("CAPSEM_SIM", "")))
    from capsem.hypervisor.qemu.driver import QemuDriver

    return QemuDriver(run_dir / "cache")
