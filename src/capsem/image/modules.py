"""Which kernel modules to load, and in which order, from the tables that come with a kernel.

`modules.dep` names for each module all those it needs, `modules.builtin` those that are part of the kernel itself.
File names mix "-" and "_" for the same module (virtio-rng.ko is virtio_rng), so names are compared with "_" alone.
Working the order out at build time means that the guest need not: it loads one file after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from capsem.model.errors import Corrupt

_SIGNATURE_MARK: Final = b"~Module signature appended~\n"
_SIGNATURE_INFO: Final = 12


@dataclass(frozen=True, slots=True)
class Tables:
    """The modules of one kernel: for each loadable one its file and the names it needs, and what is built in."""

    files: dict[str, str]
    needs: dict[str, tuple[str, ...]]
    builtin: frozenset[str]


def module_name(path: str) -> str:
    """The name of the module in a file: `kernel/drivers/char/virtio-rng.ko.xz` is `virtio_rng`."""
    return PurePosixPath(path).name.split(".ko", 1)[0].replace("-", "_")


def parse(dep: str, builtin: str) -> Tables:
    """Read the text of `modules.dep` and `modules.builtin`. Raises Corrupt for a line that is neither."""
    files: dict[str, str] = {}
    needs: dict[str, tuple[str, ...]] = {}
    for line in dep.splitlines():
        path, colon, others = line.partition(":")
        if not colon:
            raise Corrupt(f"modules.dep has a line without a colon: {line!r}")
        files[module_name(path)] = path
        needs[module_name(path)] = tuple(module_name(other) for other in others.split())
    return Tables(files, needs, frozenset(module_name(line) for line in builtin.split()))


def read(directory: Path) -> Tables:
    """The tables in `/usr/lib/modules/<version>`. Raises Corrupt when depmod has not been run there."""
    try:
        dep, builtin = ((directory / name).read_text() for name in ("modules.dep", "modules.builtin"))
    except FileNotFoundError as exc:
        raise Corrupt(f"the kernel's module table {exc.filename} is missing") from exc
    return parse(dep, builtin)


def load_order(tables: Tables, wanted: Iterable[str], *, loaded: Sequence[str] = ()) -> list[str]:
    """Names of the modules to load for `wanted`, each after those it needs, without those built in or `loaded` before.

    Raises Corrupt when a module is neither loadable nor built in, or when modules need each other in a circle.
    """
    order: list[str] = []
    done = {*loaded}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in done or name in tables.builtin:
            return
        if name in path:
            raise Corrupt(f"kernel modules need each other in a circle: {' -> '.join([*path, name])}")
        if name not in tables.files:
            raise Corrupt(f"this kernel has no module {name!r}")
        for other in tables.needs[name]:
            visit(other, (*path, name))
        done.add(name)
        order.append(name)

    for name in wanted:
        visit(name.replace("-", "_"), ())
    return order


def strip_signature(module: bytes) -> bytes:
    """A module without the signature that Debian appends to it.

    The kernel would check it at each load, which under emulation takes longer than all the rest of loading. Here it
    proves nothing: the modules come from the same checked package as the kernel, lie in a read-only image, and once they
    are loaded no other can be.
    """
    if not module.endswith(_SIGNATURE_MARK):
        return module
    # struct module_signature: algorithm, hash, identifier type, two name lengths, three bytes unused, signature length.
    size = int.from_bytes(module[-len(_SIGNATURE_MARK) - 4 : -len(_SIGNATURE_MARK)], "big")
    end = len(module) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO - size
    if end <= 0:
        raise Corrupt("a kernel module's signature is longer than the module")
    return module[:end]
