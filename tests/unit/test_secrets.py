"""Values as the service has them: how long, asked for by how many, and changed while it runs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from capsem.model.errors import HostNotReady, InvalidInput, NotFound
from capsem.service.secret_settings import Secret, Source, from_table
from capsem.service.secrets import AGAIN, Secrets, kept_source
from capsem.simulation.loop import SimLoop


class LoopClock:
    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class Vault:
    """Sources: one value, which may take its time, or not be had."""

    def __init__(self) -> None:
        self.text = "first"
        self.asked = 0
        self.takes = 0.0
        self.kept: dict[str, str] = {}

    async def read(self, source: Source) -> str:
        self.asked += 1
        await asyncio.sleep(self.takes)
        if source.kind == "keyring":
            if source.reference.partition("/")[2] not in self.kept:
                raise HostNotReady("not there")
            return self.kept[source.reference.partition("/")[2]]
        if not self.text:
            raise HostNotReady("not now")
        return self.text

    async def keep(self, user: str, value: str) -> str:
        self.kept[user] = value
        return "a vault"

    async def forget(self, user: str) -> None:
        self.kept.pop(user, None)


class World:
    def __init__(self, home: Path, text: str = "") -> None:
        self.home, self.vault, self.told = home, Vault(), 0
        self.file = home / "config.toml"
        self.file.write_text(text or '[[secret]]\nname = "a"\nsource = "env:A"\nhosts = ["a.test"]\nttl = 30\n')

        def changed() -> None:
            self.told += 1

        self.secrets = Secrets({"CAPSEM_HOME": str(home)}, home, LoopClock(), changed, self.vault)  # type: ignore[arg-type]
        self.secrets.load()


def play(scene: Coroutine[Any, Any, None]) -> None:
    """In virtual time."""
    loop = SimLoop(random.Random(1))
    try:
        loop.run_until_complete(scene)
    finally:
        loop.close()


def test_a_value_is_kept_for_its_time_and_no_longer(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path)
        assert await it.secrets.value("a") == ("first", 30)
        it.vault.text = "second"
        await asyncio.sleep(29)
        assert await it.secrets.value("a") == ("first", 1)
        await asyncio.sleep(1)
        assert it.secrets._kept == {}, "forgotten, though nobody has asked"
        assert await it.secrets.value("a") == ("second", 30)
        assert it.vault.asked == 2
        it.vault.text = "third"
        assert await it.secrets.value("a", anew=True) == ("third", 30)

    play(scene())


def test_those_who_ask_at_once_share_one_asking(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path)
        it.vault.takes = 5
        asked = [asyncio.create_task(it.secrets.value("a")) for _ in range(50)]
        await asyncio.sleep(1)
        asked[0].cancel()  # one who gives up takes nothing from the others
        assert {value.text for value in await asyncio.gather(*asked[1:])} == {"first"}
        assert it.vault.asked == 1

    play(scene())


def test_a_source_that_fails_is_not_asked_again_at_once(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path)
        it.vault.text = ""
        for _ in range(20):
            with pytest.raises(HostNotReady, match="not now"):
                await it.secrets.value("a")
        assert it.vault.asked == 1
        it.vault.text = "better"
        await asyncio.sleep(AGAIN)
        assert (await it.secrets.value("a")).text == "better"

    play(scene())


def test_a_failure_that_nobody_waits_for_any_more(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path)
        it.vault.takes, it.vault.text = 5, ""
        asking = asyncio.create_task(it.secrets.value("a"))
        await asyncio.sleep(1)
        asking.cancel()
        await asyncio.sleep(10)
        it.vault.text = "back"
        assert (await it.secrets.value("a")).text == "back"

    play(scene())


def test_settings_that_are_read_again(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path)
        assert it.told == 1
        await it.secrets.value("a")
        it.secrets.load()
        assert it.told == 1
        assert it.vault.asked == 1
        it.file.write_text(it.file.read_text().replace("a.test", "b.test"))
        it.secrets.load()
        assert it.told == 2
        assert it.secrets.get("a").hosts == ("b.test",)
        await it.secrets.value("a")
        assert it.vault.asked == 2, "what was kept was another one's"
        it.file.write_text("[[secret]]\n")
        with pytest.raises(InvalidInput):
            it.secrets.load()
        assert it.secrets.get("a").hosts == ("b.test",)
        it.file.write_text("")
        it.secrets.load()
        with pytest.raises(NotFound, match="capsem secret set a"):
            await it.secrets.value("a")

    play(scene())


def new(name: str = "n", source: str = "env:N", hosts: tuple[str, ...] = ("n.test",), where: str = "") -> Secret:
    return from_table({"name": name, "source": source, "hosts": list(hosts)}, where)


def test_a_secret_is_set_changed_and_removed(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path, "# mine\n[vm.resources]\nram_gb = 1\n")
        mine = str(it.file)
        kept = new(source=str(kept_source("n")), where=mine)
        assert await it.secrets.set(kept, "value\n") == "a vault"
        assert it.vault.kept == {"n": "value"}
        assert "value" not in it.file.read_text()
        assert (await it.secrets.value("n")).text == "value"
        await it.secrets.set(kept, "rotated")
        assert (await it.secrets.value("n")).text == "rotated", "at once, not when its time is over"
        told = it.told
        await it.secrets.set(new(where=mine), None)
        assert it.vault.kept == {}, "nobody needs it any more"
        assert it.told > told
        assert (await it.secrets.value("n")).text == "first"
        await it.secrets.remove("n")
        assert it.secrets.all() == []
        assert it.file.read_text() == "# mine\n[vm.resources]\nram_gb = 1\n"
        with pytest.raises(NotFound):
            await it.secrets.remove("n")

    play(scene())


def test_what_cannot_be_set_changes_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path)
        before = it.file.read_text()
        with pytest.raises(InvalidInput, match="cannot be a secret"):
            await it.secrets.set(new(source=str(kept_source("n"))), "two\nlines")
        it.file.write_text("not toml")
        with pytest.raises(InvalidInput, match="cannot be read"):
            await it.secrets.set(new(), None)
        assert it.file.read_text() == "not toml"
        it.file.write_text(before)
        assert [each.name for each in it.secrets.all()] == ["a"]

    play(scene())


def test_the_companys_are_not_the_users_to_change(tmp_path: Path) -> None:
    async def scene() -> None:
        it = World(tmp_path)
        corporate = tmp_path / "corp.toml"
        corporate.write_text(it.file.read_text())
        it.secrets.environ = {"CAPSEM_HOME": str(tmp_path), "CAPSEM_CORP_CONFIG": str(corporate)}
        it.secrets.load()
        with pytest.raises(InvalidInput, match=r"corp\.toml"):
            await it.secrets.remove("a")
        with pytest.raises(InvalidInput, match=r"corp\.toml, which goes first"):
            await it.secrets.set(new("a"), None)

    play(scene())
