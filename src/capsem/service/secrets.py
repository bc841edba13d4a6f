"""The secrets of this service: which there are, and what their values are just now.

A value is asked for when somebody needs it, and kept in memory for its ttl, 60 seconds at most. Those who need it at the same
moment share one asking; a source that fails is not asked again at once. Nothing here is written anywhere, but for values
that the user has Capsem keep (secret_sources.Keyring), and no message holds a value.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from capsem import config
from capsem.model.errors import CapsemError, InvalidInput, NotFound
from capsem.service import secret_settings
from capsem.service.secret_settings import KEPT_SERVICE, Secret, Source
from capsem.service.secret_sources import Sources, check_value
from capsem.service.settings_file import with_table, without_table
from capsem.store import durable
from capsem.system import Clock

AGAIN: Final = 2.0  # seconds after a source failed

log = logging.getLogger("capsem_service.secrets")


class Value(NamedTuple):
    """A value, and for how many seconds more it may be kept."""

    text: str
    seconds: float


class _Kept(NamedTuple):
    """A value until then, or why there is none."""

    value: str
    until: float
    problem: CapsemError | None = None


class Secrets:
    """`changed` is called whenever definitions or values are others."""

    def __init__(
        self,
        environ: Mapping[str, str],
        home: Path,
        clock: Clock,
        changed: Callable[[], None] = lambda: None,
        sources: Sources | None = None,
    ) -> None:
        """Nothing is read yet."""
        self.environ = environ
        self._clock = clock
        self.changed = changed
        self._sources = sources or Sources(environ, home)
        self._defined: dict[str, Secret] = {}
        self._kept: dict[str, _Kept] = {}
        self._asking: dict[str, asyncio.Task[str]] = {}
        self._changing = asyncio.Lock()

    def load(self) -> None:
        """Read the settings. Raises InvalidInput; then everything stays as it was."""
        defined = secret_settings.load(self.environ)
        same = defined == self._defined
        self._defined = defined
        if not same:
            self._kept.clear()
            self.changed()

    def all(self) -> list[Secret]:
        """Those that there are, by name."""
        return [self._defined[name] for name in sorted(self._defined)]

    def find(self, name: str) -> Secret | None:
        """One of them."""
        return self._defined.get(name)

    def get(self, name: str) -> Secret:
        """One of them. Raises NotFound."""
        secret = self._defined.get(name)
        if secret is None:
            raise NotFound(
                f"there is no secret {name[:60]}", hint=f"`capsem secret set {name[:60]} --host HOST` makes one"
            )
        return secret

    # -- values

    async def value(self, name: str, *, anew: bool = False) -> Value:
        """The value of a secret. `anew`: whatever is remembered. Raises NotFound, HostNotReady, Corrupt, InvalidInput."""
        secret, now = self.get(name), self._clock.monotonic()
        kept = self._kept.get(name)
        if kept is not None and now < kept.until and not anew:
            if kept.problem is not None:
                raise kept.problem
            return Value(kept.value, kept.until - now)
        asking = self._asking.get(name)
        if asking is None:
            asking = asyncio.create_task(self._ask(secret), name=f"secret {name}")
            self._asking[name] = asking
        return Value(await asyncio.shield(asking), secret.ttl)

    async def _ask(self, secret: Secret) -> str:
        name = secret.name
        try:
            value = await self._sources.read(secret.source)
        except CapsemError as error:
            log.warning("the value of the secret %s cannot be had: %s", name, error)
            self._keep(secret, _Kept("", self._clock.monotonic() + AGAIN, error))
            raise
        else:
            self._keep(secret, _Kept(value, self._clock.monotonic() + secret.ttl))
            return value
        finally:
            self._asking.pop(name, None)

    def _keep(self, secret: Secret, kept: _Kept) -> None:
        """For its time, and not a moment longer: it is forgotten though nobody asks."""
        if self._defined.get(secret.name) is not secret:
            return
        self._kept[secret.name] = kept
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, kept.until - self._clock.monotonic()), self._forget, secret.name, kept)

    def _forget(self, name: str, kept: _Kept) -> None:
        if self._kept.get(name) is kept:
            del self._kept[name]

    # -- changes

    async def set(self, secret: Secret, value: str | None) -> str | None:
        """Define a secret in the user's settings, in place of one of that name; with a value, have Capsem keep that. Returns
        where it lies. Raises InvalidInput, OSError, HostNotReady: then it is as it was, but for the value that is kept.
        """
        async with self._changing:
            where, before = None, self._defined.get(secret.name)
            if before is not None and before.where != self._file:
                raise InvalidInput(
                    f"the secret {secret.name} is defined in {before.where}, which goes first",
                    hint="give yours another name",
                )
            if value is not None:
                where = await self._sources.keep(secret.source.reference.partition("/")[2], check_value(value))
            self._write(lambda text: with_table(text, "secret", secret.to_table()))
            self._kept.pop(secret.name, None)
            self.load()
            self.changed()
            if before is not None and before.source.kept and before.source != secret.source:
                await self._sources.forget(before.source.reference.partition("/")[2])
            return where

    async def remove(self, name: str) -> None:
        """Take a secret out of the user's settings, and forget its value. VMs that it was lent to have it no more.

        Raises NotFound, InvalidInput, OSError, HostNotReady.
        """
        async with self._changing:
            secret = self.get(name)
            if secret.where != self._file:
                raise InvalidInput(f"the secret {name} is defined in {secret.where}", hint="it is taken out there")
            self._write(lambda text: without_table(text, "secret", name))
            self._kept.pop(name, None)
            self.load()
            if secret.source.kept:
                await self._sources.forget(secret.source.reference.partition("/")[2])

    @property
    def _file(self) -> str:
        return config.user_file(self.environ)

    def _write(self, change: Callable[[str], str]) -> None:
        path = Path(self._file)
        text = secret_settings.text_of(str(path))
        secret_settings.read(text, str(path))
        new = change(text)
        secret_settings.read(new, str(path))  # never a file that cannot be read again
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.write(path, new.encode())


def kept_source(name: str) -> Source:
    """That of a value which Capsem keeps."""
    return Source("keyring", f"{KEPT_SERVICE}/{name}")
