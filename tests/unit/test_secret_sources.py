"""Where values come from: each kind, and what is in the way. No message holds what was read."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from pathlib import Path

import keyring
import keyring.backend
import keyring.backends.fail
import keyring.errors
import pytest

from capsem.model.errors import CapsemError, Corrupt, HostNotReady, InvalidInput
from capsem.service import secret_sources
from capsem.service.secret_settings import Source
from capsem.service.secret_sources import DesktopKeyring, FileKeyring, Sources, find_keyring


@pytest.fixture(autouse=True)
def no_desktop(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks, or writes into, the keyring of whoever runs it."""
    monkeypatch.setattr(keyring, "get_keyring", keyring.backends.fail.Keyring)


def value(sources: Sources, kind: str, reference: str) -> str:
    return asyncio.run(sources.read(Source(kind, reference)))


def test_the_environment(tmp_path: Path) -> None:
    sources = Sources({"KEY": "v\n", "EMPTY": ""}, tmp_path)
    assert value(sources, "env", "KEY") == "v"
    for name in ("EMPTY", "NONE"):
        with pytest.raises(HostNotReady, match=f"the service has no variable {name}"):
            value(sources, "env", name)


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("from a file\r\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = Sources({}, tmp_path)
    assert value(sources, "file", str(tmp_path / "token")) == "from a file"
    assert value(sources, "file", "~/token") == "from a file"
    with pytest.raises(HostNotReady, match="cannot be read: No such file"):
        value(sources, "file", "~/none")
    (tmp_path / "token").write_bytes(b"\xffsecret")
    with pytest.raises(HostNotReady, match="no text") as raised:
        value(sources, "file", "~/token")
    assert "secret" not in raised.value.message


@pytest.mark.parametrize("text", ["two\nlines", "a\0b", "tab\there", "x" * (16 * 1024 + 1), "\x7f"])
def test_what_cannot_be_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput, match="that cannot be a secret") as raised:
        value(Sources({"KEY": text}, tmp_path), "env", "KEY")
    assert text not in str(raised.value)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o700)
    return str(path)


def test_a_command_gets_its_arguments_and_no_shell(tmp_path: Path) -> None:
    program = script(
        tmp_path / "tool", "import os, sys\nprint(sys.argv[1:], os.environ['A'], os.getcwd(), sys.stdin.read())"
    )
    found = value(Sources({"A": "b"}, tmp_path), "command", f"{program} 'x y' $HOME `id` ; ls")
    assert found == "['x y', '$HOME', '`id`', ';', 'ls'] b / "


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import sys; print('hidden'); sys.exit(3)", "ended with 3"),
        ("print('hidden' * 5000)", "prints more than a secret"),
        ("pass", "printed nothing"),
        ("import os; os.write(1, b'\\xff')", "no text"),
    ],
)
def test_a_command_that_fails(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(HostNotReady, match=why) as raised:
        value(Sources({}, tmp_path), "command", script(tmp_path / "tool", text) + " an-argument")
    assert "hidden" not in str(raised.value)
    assert "an-argument" not in str(raised.value)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostNotReady, match="cannot be run: No such file"):
        value(Sources({}, tmp_path), "command", str(tmp_path / "none"))


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret_sources, "COMMAND_LIMIT", 0.5)
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    program = script(
        tmp_path / "tool",
        "import os, time\nchild = os.fork()\nif child: open("
        f"{str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child}}')\ntime.sleep(600)",
    )

    async def scene() -> list[int]:
        reading = asyncio.create_task(asyncio.to_thread(pids.read_text))
        with pytest.raises(HostNotReady, match="took more than"):
            await Sources({}, tmp_path).read(Source("command", program))
        return [int(each) for each in (await reading).split()]

    monkeypatch.setattr(secret_sources, "COMMAND_LIMIT", 5.0)
    for pid in asyncio.run(scene()):
        assert not running(pid)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- keyrings


def test_our_own_file(tmp_path: Path) -> None:
    sources = Sources({}, tmp_path / "home")
    with pytest.raises(HostNotReady, match=r"secrets\.json has no capsem/a"):
        value(sources, "keyring", "capsem/a")
    assert asyncio.run(sources.keep("a", "value")) == str(tmp_path / "home" / "secrets.json")
    asyncio.run(sources.keep("b", "other"))
    assert value(sources, "keyring", "capsem/a") == "value"
    assert stat.S_IMODE((tmp_path / "home" / "secrets.json").stat().st_mode) == 0o600
    asyncio.run(sources.forget("a"))
    asyncio.run(sources.forget("a"))
    with pytest.raises(HostNotReady):
        value(sources, "keyring", "capsem/a")
    assert value(sources, "keyring", "capsem/b") == "other"


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}', "[" * 100_000])
def test_our_own_file_when_it_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "secrets.json").write_text(text)
    with pytest.raises(Corrupt, match="is damaged"):
        value(Sources({}, tmp_path), "keyring", "capsem/a")
    with pytest.raises(Corrupt):
        asyncio.run(Sources({}, tmp_path).keep("a", "v"))
    assert (tmp_path / "secrets.json").read_text() == text


class Memory(keyring.backend.KeyringBackend):
    """A desktop's keyring, which may be locked."""

    priority = 5  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise keyring.errors.KeyringLocked("locked")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.get_password(service, username)
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


def test_the_desktops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desktop = Memory()
    monkeypatch.setattr(keyring, "get_keyring", lambda: desktop)
    for name in ("get_password", "set_password", "delete_password"):
        monkeypatch.setattr(keyring, name, getattr(desktop, name))
    sources = Sources({}, tmp_path)
    assert "the keyring" in asyncio.run(sources.keep("a", "value"))
    assert value(sources, "keyring", "capsem/a") == "value"
    asyncio.run(sources.forget("a"))
    asyncio.run(sources.forget("a"))
    assert desktop.kept == {}
    desktop.locked = True
    for question in (sources.read(Source("keyring", "x/y")), sources.keep("a", "value"), sources.forget("a")):
        with pytest.raises(HostNotReady, match="does not answer: locked"):
            asyncio.run(question)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_which_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(find_keyring(tmp_path), FileKeyring)  # the package is there, and has nothing to offer
    monkeypatch.setattr(keyring, "get_keyring", Memory)
    assert isinstance(find_keyring(tmp_path), DesktopKeyring)
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert isinstance(find_keyring(tmp_path), FileKeyring)


def test_a_keyring_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_sources, "KEYRING_LIMIT", 0.05)
    silent = asyncio.Event()

    async def scene() -> None:
        loop = asyncio.get_running_loop()

        async def wait(*_question: object) -> str:
            await silent.wait()
            return ""

        monkeypatch.setattr(asyncio, "to_thread", wait)
        with pytest.raises(HostNotReady, match="has not answered"):
            await Sources({}, tmp_path).read(Source("keyring", "a/b"))
        assert loop.is_running()

    asyncio.run(scene())


def test_every_failure_is_one_of_ours(tmp_path: Path) -> None:
    for kind, reference in (("env", "X"), ("file", "/none"), ("command", "/none"), ("keyring", "a/b")):
        with pytest.raises(CapsemError):
            value(Sources({}, tmp_path), kind, reference)
