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
ENV_VALUE_BYTES: Final = 128 * 1024
ENV_TOTAL_BYTES: Final = 10 * 1024 * 1024

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
        key_size, value_size = (len(text.encode(errors="surrogatepass")) for text in (key, value))
        if key_size > ENV_KEY_BYTES or value_size > ENV_VALUE_BYTES:
            raise InvalidInput(
                f"environment variable {shown} is too long",
                hint=f"names up to {ENV_KEY_BYTES} bytes, values up to {ENV_VALUE_BYTES}",
            )
        total += key_size + value_size
    if total > ENV_TOTAL_BYTES:
        raise InvalidInput("the environment is too large", hint=f"at most {ENV_TOTAL_BYTES >> 20} MiB in all")
