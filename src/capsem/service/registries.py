"""Which package registries this host's own clients are set to: pip, npm, apt, cargo and go, as their files, variables and
programs say. None is known to Capsem itself.

A client that is not set to anything has a default of its own; pip, npm and go are asked for theirs. Only hosts and ports are
taken: what else stands in an address, a password say, is not.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from capsem.egress.presets import Registry
from capsem.egress.rules import host_pattern

ASK_LIMIT: Final = 10.0  # seconds for a program to say what it is set to
LARGEST: Final = 1024 * 1024  # bytes of a file that are read

_PORTS: Final = {"http": 80, "https": 443}
# Where pip's default index is, and where what it lists lies.
_PIP_DEFAULT: Final = (
    "from pip._internal.models.index import PyPI as i; print(i.simple_url, 'https://' + i.file_storage_domain)"
)
_NPM_LINE: Final = re.compile(r"\s*(?:@[^:=\s]+:)?registry\s*=\s*(\S+)")
_APT_LINE: Final = re.compile(r"\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?(\S+)")
_APT_URIS: Final = re.compile(r"^URIs:((?:.*(?:\n[ \t].*)*))", re.MULTILINE | re.IGNORECASE)

Run = Callable[[Sequence[str]], str]  # what a program prints, "" when it cannot be asked
Found = Iterator[tuple[str, str]]  # address, and where it stands


def run_program(environ: Mapping[str, str]) -> Run:
    """Asks programs that are in the environment's PATH, for at most ASK_LIMIT."""

    def run(argv: Sequence[str]) -> str:
        program = shutil.which(argv[0], path=environ.get("PATH", ""))
        if program is None:
            return ""
        try:
            done = subprocess.run(
                [program, *argv[1:]],
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ASK_LIMIT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""

    return run


def discover(environ: Mapping[str, str], run: Run, root: Path = Path("/")) -> tuple[Registry, ...]:
    """All that are found; what cannot be read says nothing. Blocks. `root` is for tests: where the host's files are."""
    host = _Host(environ, run, root)
    found: dict[tuple[str, str, int], Registry] = {}
    for client, addresses in (
        ("pip", host.pip()),
        ("npm", host.npm()),
        ("apt", host.apt()),
        ("cargo", host.cargo()),
        ("go", host.go()),
    ):
        for address, where in addresses:
            if (registry := _registry(client, address, where)) is not None:
                found.setdefault((registry.client, registry.host, registry.port), registry)
    return tuple(found.values())


def _registry(client: str, address: str, where: str) -> Registry | None:
    try:
        url = urlsplit(address.strip().strip("\"'"))
        port = url.port or _PORTS.get(url.scheme, 0)
        return Registry(client, host_pattern(url.hostname or ""), port, where) if port else None
    except ValueError:
        return None  # no address, or one by number, which a rule has to name


class _Host:
    def __init__(self, environ: Mapping[str, str], run: Run, root: Path) -> None:
        self._environ = environ
        self._run = run
        self._root = root
        self._home = Path(environ.get("HOME") or "/nonexistent")
        self._config = Path(environ.get("XDG_CONFIG_HOME") or self._home / ".config")

    def _read(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                return file.read(LARGEST).decode("utf-8", "replace")
        except OSError:
            return ""

    def _variable(self, *names: str) -> Found:
        for name in names:
            for address in self._environ.get(name, "").split():
                yield address, f"the variable {name}"

    def _chosen(self, variable: str, default: Path) -> Path:
        return Path(self._environ.get(variable) or default)

    def pip(self) -> Found:
        """The index, more of them, and pages of links."""
        found = list(self._variable("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"))
        indexed = bool(self._environ.get("PIP_INDEX_URL"))
        files = [
            self._root / "etc" / "pip.conf",
            self._root / "etc" / "xdg" / "pip" / "pip.conf",
            self._home / ".pip" / "pip.conf",
            self._config / "pip" / "pip.conf",
            *([Path(named)] if (named := self._environ.get("PIP_CONFIG_FILE")) else []),
        ]
        for path in files:
            parser = configparser.RawConfigParser(strict=False)
            try:
                parser.read_string(self._read(path))
            except configparser.Error:
                continue
            for section in parser.sections():
                for key in ("index-url", "extra-index-url", "find-links"):
                    addresses = parser.get(section, key, fallback="").split()
                    indexed = indexed or (bool(addresses) and key == "index-url")
                    found += [(address, str(path)) for address in addresses]
        if not indexed:
            found += [(address, "pip's own default") for address in self._run(["python3", "-c", _PIP_DEFAULT]).split()]
        yield from found

    def npm(self) -> Found:
        """The registry, and those of scopes."""
        found = list(self._variable("npm_config_registry", "NPM_CONFIG_REGISTRY"))
        files = (
            self._root / "etc" / "npmrc",
            self._chosen("NPM_CONFIG_GLOBALCONFIG", self._root / "usr" / "local" / "etc" / "npmrc"),
            self._chosen("NPM_CONFIG_USERCONFIG", self._home / ".npmrc"),
        )
        for path in files:
            lines = self._read(path).splitlines()
            found += [(match[1], str(path)) for line in lines if (match := _NPM_LINE.match(line))]
        # Its own files may be elsewhere, and its default is known to itself alone.
        found += [
            (address, "npm config get registry") for address in self._run(["npm", "config", "get", "registry"]).split()
        ]
        yield from found

    def apt(self) -> Found:
        """All sources."""
        directory = self._root / "etc" / "apt"
        for path in (directory / "sources.list", *sorted(directory.glob("sources.list.d/*.list"))):
            for line in self._read(path).splitlines():
                if match := _APT_LINE.match(line):
                    yield match[1].removeprefix("mirror+"), str(path)
        for path in sorted(directory.glob("sources.list.d/*.sources")):
            for match in _APT_URIS.finditer(self._read(path)):
                for address in match[1].split():
                    yield address.removeprefix("mirror+"), str(path)

    def cargo(self) -> Found:
        """The registries and replaced sources of the user's configuration."""
        home = self._chosen("CARGO_HOME", self._home / ".cargo")
        for path in (home / "config.toml", home / "config"):
            try:
                table = tomllib.loads(self._read(path))
            except (tomllib.TOMLDecodeError, RecursionError):
                continue
            for address in _cargo_addresses(table):
                yield address, str(path)
        for name, value in self._environ.items():
            if re.fullmatch(r"CARGO_REGISTRIES_\w+_INDEX", name):
                yield _bare(value), f"the variable {name}"

    def go(self) -> Found:
        """The module proxies, and the checksum database."""
        said = self._run(["go", "env", "GOPROXY", "GOSUMDB"]).splitlines()
        if not said:
            path = self._chosen("GOENV", self._config / "go" / "env")
            pairs = dict(line.split("=", 1) for line in self._read(path).splitlines() if "=" in line)
            said = [self._environ.get(name) or pairs.get(name, "") for name in ("GOPROXY", "GOSUMDB")]
        proxies, sums = [*said, "", ""][:2]
        for address in re.split(r"[,|]", proxies):
            yield address, "go env GOPROXY"
        for word in sums.split():
            name = word.split("+", 1)[0]
            yield (name if "://" in name else f"https://{name}" if "." in name else ""), "go env GOSUMDB"


def _cargo_addresses(table: Mapping[str, Any]) -> Iterator[str]:
    registries, sources = table.get("registries"), table.get("source")
    for entries, key in ((registries, "index"), (sources, "registry"), ({"": table.get("registry")}, "index")):
        for entry in _tables(entries):
            if isinstance(address := entry.get(key), str):
                yield _bare(address)


def _tables(entries: object) -> Iterable[Mapping[str, Any]]:
    return [each for each in entries.values() if isinstance(each, dict)] if isinstance(entries, dict) else []


def _bare(address: str) -> str:
    for prefix in ("sparse+", "git+", "registry+"):
        address = address.removeprefix(prefix)
    return address
