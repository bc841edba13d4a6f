"""Where values of secrets come from: the service's environment, a keyring, a command, a file. Each is asked anew; what is
remembered, and for how long, is `secrets`' business.

Nothing here takes a word from a guest: what is run and read stands in the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol, TypeVar

from capsem.model.errors import CapsemError, Corrupt, HostNotReady, InvalidInput
from capsem.service.secret_settings import Source
from capsem.store import durable

T = TypeVar("T")

COMMAND_LIMIT: Final = 20.0  # seconds for a command
KEYRING_LIMIT: Final = 20.0  # and for a keyring, which may ask its owner
LONGEST: Final = 16 * 1024  # bytes of a value
FILE: Final = "secrets.json"  # in the home: values that Capsem keeps where there is no keyring

log = logging.getLogger("capsem_service.secrets")


class Keyring(Protocol):
    """Keeps values by service and user. Blocks; raises CapsemError."""

    name: str

    def get(self, service: str, user: str) -> str | None:
        """A value, None where there is none."""

    def set(self, service: str, user: str, value: str) -> None:
        """Keep a value."""

    def delete(self, service: str, user: str) -> None:
        """Forget it; one that is not there is no error."""


class FileKeyring:
    """One file, 0600, which nobody but its owner reads; it is no better kept than other keys in the home."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{self._path} is damaged", hint="move it away, and set its secrets again") from error
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise Corrupt(f"{self._path} is damaged", hint="move it away, and set its secrets again")
        return found

    def _write(self, values: Mapping[str, str]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.write(self._path, json.dumps(values, indent=1, sort_keys=True).encode())

    def get(self, service: str, user: str) -> str | None:
        """See Keyring."""
        return self._read().get(f"{service}/{user}")

    def set(self, service: str, user: str, value: str) -> None:
        """See Keyring."""
        self._write(self._read() | {f"{service}/{user}": value})

    def delete(self, service: str, user: str) -> None:
        """See Keyring."""
        values = self._read()
        if values.pop(f"{service}/{user}", None) is not None:
            self._write(values)


class DesktopKeyring:
    """The desktop's, by the package keyring."""

    def __init__(self, library: ModuleType) -> None:
        self._library = library
        self._error: type[Exception] = importlib.import_module("keyring.errors").KeyringError
        self.name = f"the keyring ({library.get_keyring().name})"

    def _failed(self, error: Exception) -> CapsemError:
        return HostNotReady(f"{self.name} does not answer: {error}", hint="unlock it, and try again")

    def get(self, service: str, user: str) -> str | None:
        """See Keyring."""
        try:
            found: str | None = self._library.get_password(service, user)
        except self._error as error:
            raise self._failed(error) from error
        return found

    def set(self, service: str, user: str, value: str) -> None:
        """See Keyring."""
        try:
            self._library.set_password(service, user, value)
        except self._error as error:
            raise self._failed(error) from error

    def delete(self, service: str, user: str) -> None:
        """See Keyring."""
        try:
            if self._library.get_password(service, user) is not None:
                self._library.delete_password(service, user)
        except self._error as error:
            raise self._failed(error) from error


def find_keyring(home: Path) -> Keyring:
    """The desktop's keyring where there is one and the package for it, else our own file."""
    with contextlib.suppress(ImportError):
        library = importlib.import_module("keyring")
        backend = library.get_keyring()
        if backend.priority >= 1:  # what is made for want of a better one has less
            return DesktopKeyring(library)
    return FileKeyring(home / FILE)


class Sources:
    """Reads values."""

    def __init__(self, environ: Mapping[str, str], home: Path) -> None:
        self._environ = environ
        self._home = home
        self._keyring: Keyring | None = None
        self._turn = asyncio.Lock()  # keyrings are asked one question at a time

    async def read(self, source: Source) -> str:
        """The value as it is now. Raises HostNotReady, Corrupt: the message never holds what was read."""
        if source.kind == "env":
            value: str | None = self._environ.get(source.reference)
            missing = f"the service has no variable {source.reference}"
        elif source.kind == "keyring":
            service, _, user = source.reference.partition("/")
            value = await self._ask(lambda keyring: keyring.get(service, user))
            missing = f"{self._keyring.name if self._keyring else 'the keyring'} has no {source.reference}"
        elif source.kind == "file":
            value = await asyncio.to_thread(_read_file, Path(source.reference).expanduser())
            missing = f"{source.reference} is empty"
        else:
            value = await self._run(source.reference)
            missing = f"the command {source.shown.partition(':')[2]} printed nothing"
        if not value:
            raise HostNotReady(missing, hint="`capsem secret test NAME` tells when it is there")
        return check_value(value)

    async def keep(self, user: str, value: str) -> str:
        """Keep a value for a source of the kind keyring; returns where it lies, for people."""
        await self._ask(lambda keyring: keyring.set("capsem", user, value))
        assert self._keyring is not None
        return self._keyring.name

    async def forget(self, user: str) -> None:
        """Forget a value that was kept."""
        await self._ask(lambda keyring: keyring.delete("capsem", user))

    async def _ask(self, question: Callable[[Keyring], T]) -> T:
        async with self._turn:
            try:
                async with asyncio.timeout(KEYRING_LIMIT):
                    return await asyncio.to_thread(self._asked, question)
            except TimeoutError:
                raise HostNotReady(
                    f"the keyring has not answered for {KEYRING_LIMIT:.0f} s", hint="unlock it, and try again"
                ) from None

    def _asked(self, question: Callable[[Keyring], T]) -> T:
        if self._keyring is None:
            self._keyring = find_keyring(self._home)
        return question(self._keyring)

    async def _run(self, line: str) -> str:
        """What a command prints: an argument list, no shell; nothing to read."""
        argv = shlex.split(line)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=dict(self._environ),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise HostNotReady(
                f"the command {argv[0]} cannot be run: {error.strerror}", hint="correct the source in the settings"
            ) from error
        try:
            async with asyncio.timeout(COMMAND_LIMIT):
                assert process.stdout is not None
                output = b""
                while data := await process.stdout.read(LONGEST):
                    output += data
                    if len(output) > LONGEST + 2:
                        raise HostNotReady(f"the command {argv[0]} prints more than a secret", hint=_TOO_LONG)
                status = await process.wait()
        except TimeoutError:
            raise HostNotReady(f"the command {argv[0]} took more than {COMMAND_LIMIT:.0f} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                await process.wait()
        if status != 0:
            raise HostNotReady(f"the command {argv[0]} ended with {status}", hint="run it yourself to see why")
        return _text(output)


_TOO_LONG: Final = f"at most {LONGEST} bytes"


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 2)
    except OSError as error:
        raise HostNotReady(f"{path} cannot be read: {error.strerror}") from error
    return _text(data)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise HostNotReady("what was read is no text", hint="a secret is one line of UTF-8") from None


def check_value(value: str) -> str:
    """A value without the end of its line. Raises InvalidInput, which does not hold it."""
    value = value.removesuffix("\n").removesuffix("\r")
    if not value or len(value.encode()) > LONGEST or any(ord(each) < 0x20 or ord(each) == 0x7F for each in value):
        raise InvalidInput("that cannot be a secret", hint=f"one line of text, no control characters, {_TOO_LONG}")
    return value
