"""Network policy as far as the service knows it: the company's file, the user's file, the hosts that were allowed for always,
and the presets. What it was last time stays in force when a file has become wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from capsem import config
from capsem.egress.compose import PROXY_VARIABLES, Layers, effective_preset
from capsem.egress.document import NOTHING, Document, check_text
from capsem.egress.facts import Layer
from capsem.egress.lint import lint
from capsem.egress.policy import Floor
from capsem.egress.presets import Registry, preset_document
from capsem.egress.reader import Problem
from capsem.egress.rules import Rule
from capsem.egress.toml import dump
from capsem.model.errors import InvalidInput, host_failed
from capsem.store import durable

ALLOWED: Final = "allowed.toml"  # in the home: what was allowed for always
_ASKS_CLIENTS: Final = frozenset({"high", "medium"})

log = logging.getLogger("capsem_service.policies")


class Policies:
    """`discover` finds the registries of this host's clients; it blocks, and is called when a VM first needs to know."""

    def __init__(self, environ: Mapping[str, str], floor: Floor, discover: Callable[[], tuple[Registry, ...]]) -> None:
        """Nothing is read yet."""
        self._environ = environ
        self._discover = discover
        self._registries: asyncio.Future[tuple[Registry, ...]] | None = None
        self._changing = asyncio.Lock()
        self.floor = floor
        self.corporate = NOTHING
        self.user = NOTHING
        self.remembered = NOTHING

    @property
    def home(self) -> Path:
        """CAPSEM_HOME."""
        return config.Paths.from_environment(self._environ).home

    @property
    def _allowed_file(self) -> Path:
        return self.home / ALLOWED

    @property
    def corporate_file(self) -> Path:
        """Where the company's rules are, whether there are any or not."""
        return Path(config.corporate_file(self._environ))

    def load(self) -> None:
        """Read the files. Raises InvalidInput that tells everything wrong with them; then nothing is changed."""
        corporate = self._read(self.corporate_file, Layer.CORPORATE)
        user = self._read(Path(config.user_file(self._environ)), Layer.USER)
        remembered = self._read(self._allowed_file, Layer.PRESET)
        self.corporate, self.user, self.remembered = corporate, user, remembered

    async def reload(self) -> None:
        """Read the files again, and ask the host's clients again; see `load`."""
        self.load()
        self._registries = None

    def _read(self, path: Path, layer: Layer) -> Document:
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path} cannot be read: {error}", hint="correct the file, or move it away") from error
        return self.parse(text, layer, str(path))

    def parse(self, text: str, layer: Layer, source: str) -> Document:
        """The policy in a file's text. Raises InvalidInput that tells everything wrong with it."""
        document, problems = self.check(text, layer, source)
        if document is None or problems:
            told = "; ".join(problem.at(source) for problem in problems)
            raise InvalidInput(told, hint="correct that; until then the policy stays as it was")
        return document

    def check(self, text: str, layer: Layer, source: str) -> tuple[Document | None, list[Problem]]:
        """The document, and what is wrong with it: what cannot be read, or what can never decide anything."""
        document, problems = check_text(text, layer, source)
        if document is not None and layer is not Layer.PRESET:
            problems = lint(document.rules, self.floor)
        return document, problems

    # -- for VMs

    def preset(self, own: Document) -> str:
        """The preset that holds for a VM."""
        return effective_preset(self.corporate, own)

    async def layers(self, own: Document) -> Layers:
        """All layers but the VM's own."""
        preset = self.preset(own)
        registries = await self.registries() if preset in _ASKS_CLIENTS else ()
        variables = {name for upper in PROXY_VARIABLES for name in (upper, upper.lower())}
        environment = {name: self._environ[name] for name in sorted(variables) if self._environ.get(name)}
        return Layers(
            self.corporate,
            self.user,
            preset_document(preset, registries, self.remembered.rules),
            MappingProxyType(environment),
        )

    def prepare(self) -> None:
        """Find out about the host's clients now, so that the first VM does not have to wait for that."""
        self._registries = asyncio.ensure_future(asyncio.to_thread(self._discover))

    async def registries(self) -> tuple[Registry, ...]:
        """The registries of this host's clients."""
        if self._registries is None:
            self.prepare()
        assert self._registries is not None
        try:
            return await asyncio.shield(self._registries)
        except OSError as error:
            self._registries = None
            raise host_failed("the registries of this host's clients cannot be found out", error) from error

    async def remember(self, rule: Rule) -> None:
        """Allow a host for always: for every VM with the preset medium. Raises OSError."""
        async with self._changing:
            kept = tuple(each for each in self.remembered.rules if each.name != rule.name)
            document = replace(self.remembered, rules=(*kept, replace(rule, layer=Layer.PRESET, until=None)))
            head = ("What was allowed with `capsem net allow --always`, for all VMs with the preset medium.",)
            self._allowed_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.write(self._allowed_file, dump(document, head=head).encode())
            self.remembered = document
