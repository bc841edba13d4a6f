"""Where things are (`Paths`) and what the user may set (`SETTINGS`). The environment is passed in.

A setting's value is, from weak to strong: its default; the user's file, $CAPSEM_USER_CONFIG or else
$CAPSEM_HOME/config.toml; its environment variable; the corporate file, $CAPSEM_CORP_CONFIG or else
$CAPSEM_HOME/corp.toml. A file that is not there says nothing. The files are TOML, a setting's dotted name is its place in
the tables:

    [vm.resources]
    ram_gb = 2

What else stands in the table `network` is policy, which `egress.document` reads; `[[secret]]` are `service.secret_settings`'.

The command line reads this module on every call: there are no dataclasses here, and `pathlib` is imported when a Path
is wanted, which `capsem list` never does; together they would cost a quarter of its time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from capsem.egress.schema import DEFAULT_PRESET, PRESETS
from capsem.model.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

SOCKET_NAME: Final = "service.sock"
SUSPEND, STOP, KEEP = "suspend", "stop", "keep"  # values of vm.on_service_stop
ON, OFF = "on", "off"
SECRETS: Final = "secret"  # an array of tables, which `service.secret_settings` reads
POLICY: Final = "network."  # names that begin so are policy, unless they are settings


class Setting(NamedTuple):
    """One row of the table: one of `choices`, or a number between `low` and `high`, an int unless the default is a float."""

    name: str
    default: float | str
    env: str
    help: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()

    def check(self, value: object, where: str) -> float | str:
        """`value` as this setting's; raises InvalidInput that begins with `where`."""
        if self.choices:
            if value not in self.choices:
                raise InvalidInput(
                    f"{where}: {self.name} is {value!r}", hint=f"it has to be one of: {', '.join(self.choices)}"
                )
            return str(value)
        whole = isinstance(self.default, int)
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not self.low <= value <= self.high:  # type: ignore[operator]
            kind = "a whole number" if whole else "a number"
            raise InvalidInput(
                f"{where}: {self.name} is {value!r}", hint=f"it has to be {kind} from {self.low:g} to {self.high:g}"
            )
        return value  # type: ignore[return-value]


SETTINGS: Final = (
    Setting(
        "vm.resources.max_concurrent_vms",
        10,
        "CAPSEM_MAX_CONCURRENT_VMS",
        "how many VMs may run at once",
        1,
        1000,
    ),
    Setting("vm.resources.ram_gb", 4.0, "CAPSEM_RAM_GB", "memory of a new VM, in GiB", 0.25, 16),
    Setting("vm.resources.cpu_count", 4, "CAPSEM_CPU_COUNT", "CPUs of a new VM", 1, 8),
    Setting(
        "vm.on_service_stop",
        SUSPEND,
        "CAPSEM_ON_SERVICE_STOP",
        "what becomes of running VMs when the service is stopped: suspend those that are persistent and stop the others, "
        "stop them all, or keep them for the next service to take over",
        choices=(SUSPEND, STOP, KEEP),
    ),
    Setting(
        "vm.ledger",
        ON,
        "CAPSEM_LEDGER",
        "whether commands, files and traffic are recorded in each VM's session.db; a VM's own life always is",
        choices=(ON, OFF),
    ),
    Setting(
        "vm.templates",
        ON,
        "CAPSEM_TEMPLATES",
        "whether a new VM is a fork of a machine of its size that has booted before; the first of a size then boots that",
        choices=(ON, OFF),
    ),
    Setting(
        "pool.size",
        0,
        "CAPSEM_POOL_SIZE",
        "how many VMs of the default size run ahead of need, for creates to take; each holds memory while it waits",
        0,
        64,
    ),
    Setting(
        "network.preset",
        DEFAULT_PRESET,
        "CAPSEM_NETWORK_PRESET",
        "what a new VM may reach unless it is told otherwise: "
        + "; ".join(f"{name}: {says}" for name, says in PRESETS.items()),
        choices=tuple(PRESETS),
    ),
)

NETWORK_PRESET: Final = "network.preset"

_DEFAULTS: Final = MappingProxyType({row.name: row.default for row in SETTINGS})


class Settings(NamedTuple):
    """The values in force, and what there was to complain about, one sentence each."""

    values: Mapping[str, Any] = _DEFAULTS
    warnings: tuple[str, ...] = ()

    @property
    def max_concurrent_vms(self) -> int:
        """How many VMs may run at once."""
        return int(self.values["vm.resources.max_concurrent_vms"])

    @property
    def ram_mb(self) -> int:
        """Memory of a new VM, in MiB."""
        return int(self.values["vm.resources.ram_gb"] * 1024)

    @property
    def cpu_count(self) -> int:
        """CPUs of a new VM."""
        return int(self.values["vm.resources.cpu_count"])

    @property
    def ledger(self) -> bool:
        """Whether commands and files are recorded."""
        return bool(self.values["vm.ledger"] == ON)

    @property
    def templates(self) -> bool:
        """Whether new VMs are forks of templates."""
        return bool(self.values["vm.templates"] == ON)

    @property
    def pool_size(self) -> int:
        """How many VMs wait for somebody to create them."""
        return int(self.values["pool.size"])

    @property
    def network_preset(self) -> str:
        """What a new VM may reach, unless it is told otherwise."""
        return str(self.values[NETWORK_PRESET])

    @property
    def on_service_stop(self) -> str:
        """SUSPEND, STOP or KEEP."""
        return str(self.values["vm.on_service_stop"])


def load(environ: Mapping[str, str]) -> Settings:
    """Read the settings. Unknown names become warnings; raises InvalidInput naming file (or variable) and setting."""
    rows = {row.name: row for row in SETTINGS}
    values = dict(_DEFAULTS)
    warnings: list[str] = []

    def take(path: str) -> None:
        for name, value in _flatten(_read(path), ""):
            if name in rows:
                values[name] = rows[name].check(value, path)
            elif not name.startswith(POLICY) and name != SECRETS:
                warnings.append(f"{path}: there is no setting {name}; it is ignored")

    take(user_file(environ))
    for row in SETTINGS:
        if text := environ.get(row.env):
            value = text if row.choices else _number(text)
            values[row.name] = row.check(value, f"environment variable {row.env}")
    take(corporate_file(environ))
    return Settings(values, tuple(warnings))


def user_file(environ: Mapping[str, str]) -> str:
    """Where the user's settings are, whether there are any or not."""
    return environ.get("CAPSEM_USER_CONFIG") or os.path.join(_home(environ), "config.toml")


def corporate_file(environ: Mapping[str, str]) -> str:
    """Where the company's settings are, whether there are any or not."""
    return environ.get("CAPSEM_CORP_CONFIG") or os.path.join(_home(environ), "corp.toml")


def _read(path: str) -> dict[str, Any]:
    import tomllib
    from pathlib import Path

    if not Path(path).exists():
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as exc:
        raise InvalidInput(f"{path} cannot be read: {exc}", hint="correct the file, or move it away") from exc


def _flatten(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        name = prefix + key
        if isinstance(value, dict) and not any(row.name == name for row in SETTINGS):
            yield from _flatten(value, name + ".")
        else:
            yield name, value


def _number(text: str) -> float | str:
    """An environment variable's text as a number; what is none stays text, to be refused by `check`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Paths(NamedTuple):
    """Where this user's Capsem lives: absolute, with symbolic links resolved once and for all.

    The fields are the paths as text; the properties are the same as Path. `socket` is the service's; `explicit` is
    whether the caller named it, and so means that service and no other.
    """

    home_text: str
    run_text: str
    socket: str
    explicit: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], uds_path: str | os.PathLike[str] | None = None) -> Paths:
        """Resolve CAPSEM_HOME, CAPSEM_RUN_DIR, CAPSEM_UDS_PATH; empty values count as unset.

        With `uds_path` (the option --uds-path) the run directory is that socket's. Raises InvalidInput when there is
        neither HOME nor CAPSEM_HOME.
        """
        home = _home(environ)
        if uds_path is not None:
            socket = _socket(os.fspath(uds_path))
            return cls(home, os.path.dirname(socket), socket, explicit=True)
        run = os.path.realpath(environ.get("CAPSEM_RUN_DIR") or os.path.join(home, "run"))
        uds = environ.get("CAPSEM_UDS_PATH")
        return cls(home, run, _socket(uds) if uds else os.path.join(run, SOCKET_NAME))

    @property
    def home(self) -> Path:
        """CAPSEM_HOME: settings and images of this user."""
        return _path(self.home_text)

    @property
    def run_dir(self) -> Path:
        """CAPSEM_RUN_DIR: VMs, sockets and logs."""
        return _path(self.run_text)

    @property
    def uds_path(self) -> Path:
        """The service's socket."""
        return _path(self.socket)


def _home(environ: Mapping[str, str]) -> str:
    if chosen := environ.get("CAPSEM_HOME"):
        return os.path.realpath(chosen)
    if home := environ.get("HOME"):
        return os.path.realpath(os.path.join(home, ".capsem"))
    raise InvalidInput("neither CAPSEM_HOME nor HOME is set", hint="set CAPSEM_HOME to a directory of yours")


def _socket(path: str) -> str:
    """The directory is resolved, the socket itself is not: it may not be there yet, or be a link to another one."""
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory), name)


def _path(text: str) -> Path:
    from pathlib import Path

    return Path(text)
