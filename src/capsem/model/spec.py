"""What a VM is made of, as asked for by its owner. Frozen: a VM keeps its shape for life."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from capsem.model.errors import InvalidInput
from capsem.wire.environment import env_problem

CPUS: Final = range(1, 9)
RAM_MB: Final = range(256, 16384 + 1)
DISK_MB: Final = range(512, 1024 * 1024 + 1)
DEFAULT_CPUS: Final = 4
DEFAULT_RAM_MB: Final = 4096
DEFAULT_DISK_MB: Final = 16 * 1024

ENV_VARS: Final = 128
ENV_KEY_BYTES: Final = 256
# What Linux takes when it starts a program: 128 KiB for one variable, which lies in memory as "KEY=VALUE\0", and a
# quarter of the stack, hence 2 MiB, for all variables and arguments with a pointer to each. The contract's numbers are
# larger, but a VM made with them could not run a single command. The last 256 KiB are left to the commands.
ENV_ENTRY_BYTES: Final = 128 * 1024
ENV_TOTAL_BYTES: Final = 2 * 1024 * 1024 - 256 * 1024
_POINTER: Final = 8
_SEPARATORS: Final = 2  # the "=" and the NUL of an entry

_PRINTABLE = re.compile(r"[^\x21-\x7e]")


@dataclass(frozen=True, slots=True)
class VmSpec:
    """CPU count, memory and volume size in MiB, and the environment that every command in the VM gets."""

    cpus: int = DEFAULT_CPUS
    ram_mb: int = DEFAULT_RAM_MB
    disk_mb: int = DEFAULT_DISK_MB
    env: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        check_range("cpus", self.cpus, CPUS)
        check_range("ram_mb", self.ram_mb, RAM_MB)
        check_range("disk_mb", self.disk_mb, DISK_MB)
        check_env(self.env)


def check_range(name: str, value: int, allowed: range) -> int:
    """Return `value` if it lies in `allowed`; raises InvalidInput."""
    if value not in allowed:
        raise InvalidInput(f"{name} is {value}", hint=f"choose {allowed.start} to {allowed.stop - 1}")
    return value


def check_env(env: MappingProxyType[str, str] | dict[str, str]) -> None:
    """Check names and values of environment variables that are to be set in a guest; raises InvalidInput."""
    if len(env) > ENV_VARS:
        raise InvalidInput(f"{len(env)} environment variables", hint=f"at most {ENV_VARS} are allowed")
    total = 0
    for key, value in env.items():
        shown = _PRINTABLE.sub("?", key[:80])
        if problem := env_problem(key, value):
            raise InvalidInput(f"bad environment variable: {problem}", hint="leave it out or change it")
        key_size = len(key.encode(errors="surrogatepass"))
        entry_size = key_size + _SEPARATORS + len(value.encode(errors="surrogatepass"))
        if key_size > ENV_KEY_BYTES or entry_size > ENV_ENTRY_BYTES:
            raise InvalidInput(
                f"environment variable {shown} is too long",
                hint=f"names up to {ENV_KEY_BYTES} bytes, name and value together up to {ENV_ENTRY_BYTES - _SEPARATORS}; "
                "more belongs into a file",
            )
        total += entry_size + _POINTER
    if total > ENV_TOTAL_BYTES:
        raise InvalidInput(
            f"the environment is too large: {total} bytes",
            hint=f"Linux starts programs with up to {ENV_TOTAL_BYTES} bytes beside their arguments; put more into a file",
        )
