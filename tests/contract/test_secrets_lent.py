"""Secrets from the settings to the supervisor of a VM that was lent them: simulated guests, which have placeholders."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import keyring
import keyring.backends.fail
import pytest
from sim_world import RAM_MB, SimWorld, sim_world

from capsem.api.exec_types import RunRequest
from capsem.api.secret_types import SetSecretRequest
from capsem.api.vm_types import ForkRequest, ProvisionRequest
from capsem.config import Settings
from capsem.egress.facts import Subject
from capsem.egress.grants import PLACEHOLDER
from capsem.egress.heads import Headers, RequestHead
from capsem.egress.parts import SecretMisuse, SecretUnavailable
from capsem.model.errors import InvalidInput, NotFound
from capsem.service import pool
from capsem.service.memory import HostMemory
from capsem.supervisor.lending import Lending

SECRET = "the-real-value-of-it"
HOSTS = ["api.test"]


@pytest.fixture(autouse=True)
def no_desktop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "get_keyring", keyring.backends.fail.Keyring)


def play(directory: Path, scene: Callable[[SimWorld], Awaitable[None]], **how: str) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), sim_world(directory, **how) as world:
            await scene(world)

    asyncio.run(main())


async def define(world: SimWorld, name: str = "key", env: str | None = "API_KEY", **more: object) -> None:
    request = SetSecretRequest(hosts=HOSTS, env=env, **{"value": SECRET, **more})  # type: ignore[arg-type]
    await world.handlers.secrets.set(name, request)


async def create(world: SimWorld, name: str, *secrets: str, **more: object) -> None:
    request = ProvisionRequest(
        name=name, persistent=True, ram_mb=RAM_MB, cpus=1, secrets=[*secrets], **more  # type: ignore[arg-type]
    )  # fmt: skip
    await world.handlers.provision(request)


def lending(world: SimWorld, name: str) -> Lending:
    """That of a VM's supervisor."""
    return world.processes.children[world.fleet.get(name).pid].supervisor.lending


async def sent(world: SimWorld, name: str, placeholder: str, host: str = "api.test") -> str:
    """What would be sent to a host instead of a placeholder, by the VM's supervisor."""
    head = RequestHead(b"GET", b"/", Headers([(b"X-Key", placeholder.encode())]))
    sent = await lending(world, name).outgoing(Subject(443, host), head, verified=True)
    return sent.headers[0][1].decode()


async def placeholder(world: SimWorld, name: str) -> str:
    return (await world.sh(name, "echo $API_KEY")).strip()


def test_a_vm_has_a_placeholder_that_becomes_the_value_on_its_way(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await define(world)
        await create(world, "box", "key", env={"OTHER": "x"})
        await create(world, "poor")
        own = await placeholder(world, "box")
        assert PLACEHOLDER.fullmatch(own.encode())
        assert await world.sh("box", "echo $OTHER") == "x\n"
        assert await sent(world, "box", own) == SECRET
        with pytest.raises(SecretMisuse, match=r"on its way to evil\.test"):
            await sent(world, "box", own, "evil.test")
        assert await placeholder(world, "poor") == ""
        with pytest.raises(SecretMisuse, match="not lent to this VM"):
            await sent(world, "poor", own)
        assert (await world.handlers.info("box")).secrets == ["key"]
        assert (await world.handlers.info("poor")).secrets is None
        (listed,) = (await world.handlers.secrets.list()).secrets
        assert (listed.name, listed.vms, listed.source, listed.env) == ("key", ["box"], "keyring:capsem/key", "API_KEY")

    play(tmp_path, scene)


def test_the_value_is_in_no_file_but_the_one_that_keeps_it(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await define(world)
        await create(world, "box", "key")
        own = await placeholder(world, "box")
        assert await sent(world, "box", own) == SECRET
        await world.handlers.suspend("box")
        await world.handlers.resume("box")
        assert await placeholder(world, "box") == own
        assert await sent(world, "box", own) == SECRET
        await world.handlers.stop("box")

    play(tmp_path, scene)
    holding = [path.name for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == ["secrets.json"]
    assert (tmp_path / "home" / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_a_secret_that_changes_is_another_one_at_once(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await define(world)
        await create(world, "box", "key")
        own = await placeholder(world, "box")
        assert await sent(world, "box", own) == SECRET
        await define(world, value="rotated-value-of-it")
        await settled(lambda: lending(world, "box").known("key") == [])
        assert await sent(world, "box", own) == "rotated-value-of-it"
        await world.handlers.secrets.set("key", SetSecretRequest(hosts=["other.test"], value=SECRET, env="API_KEY"))
        await refused(world, own, "may go to other.test alone")
        assert await sent(world, "box", own, "other.test") == SECRET
        await world.handlers.secrets.remove("key")
        await refused(world, own, "was taken back")
        with pytest.raises(NotFound):
            await world.handlers.secrets.remove("key")
        await define(world)  # and once more: what it has in its memory is good again
        await settled(lambda: lending(world, "box").placeholders != {})
        assert await sent(world, "box", own) == SECRET

    play(tmp_path, scene)


async def settled(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def refused(world: SimWorld, own: str, why: str) -> None:
    """Once the change has reached the supervisor of `box`."""
    told: list[str] = []
    while not told:
        await asyncio.sleep(0.005)
        try:
            await sent(world, "box", own)
        except SecretMisuse as misuse:
            told.append(str(misuse))
    assert why in told[0]


def test_a_source_that_has_nothing_says_so(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        token = tmp_path / "token"
        await define(world, value=None, source=f"file:{token}")
        await create(world, "box", "key")
        own = await placeholder(world, "box")
        with pytest.raises(SecretUnavailable, match="token cannot be read: No such file"):
            await sent(world, "box", own)
        tested = await world.handlers.secrets.test("key")
        assert (tested.ok, tested.length) == (False, None)
        assert "cannot be read" in (tested.problem or "")
        token.write_text("from a file\n")
        tested = await world.handlers.secrets.test("key")
        assert (tested.ok, tested.length) == (True, 11)
        assert await sent(world, "box", own) == "from a file"

    play(tmp_path, scene)


def test_a_fork_is_lent_nothing_unless_it_is_asked_for(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await define(world)
        await create(world, "box", "key")
        own = await placeholder(world, "box")
        await world.handlers.fork("box", ForkRequest(name="plain", live=True))
        await world.handlers.fork("box", ForkRequest(name="heir", live=True, inherit_secrets=True))
        await world.handlers.fork("box", ForkRequest(name="disk", inherit_secrets=True))
        await world.handlers.fork("box", ForkRequest(name="poor"))
        for name in ("disk", "poor"):
            await world.handlers.resume(name)
        for name in ("plain", "poor"):
            assert await placeholder(world, name) == ""
            with pytest.raises(SecretMisuse, match="perhaps to box, which this one is a fork of"):
                await sent(world, name, own)
            assert (await world.handlers.info(name)).secrets is None
        for name in ("heir", "disk"):
            heirs = await placeholder(world, name)
            assert heirs != own
            assert await sent(world, name, heirs) == SECRET
            assert await sent(world, name, own) == SECRET, "as its programs have it in their memory"
            with pytest.raises(SecretMisuse):
                await sent(world, "box", heirs)

    play(tmp_path, scene, templates="on")


def test_a_vm_of_the_pool_is_lent_what_is_ordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PAUSE", 0.0)

    async def scene(world: SimWorld) -> None:
        handlers = world.handlers
        handlers.pool._memory = lambda: HostMemory(total=1000, available=500)
        sizes = {"pool.size": 1, "vm.resources.ram_gb": RAM_MB / 1024, "vm.resources.cpu_count": 1}
        handlers._configure(Settings({**handlers.settings.values, **sizes}))
        handlers.pool.begin()
        await settled(lambda: handlers.pool._members)
        await define(world)
        await create(world, "box", "key")
        assert (await handlers.info("box")).boot_kind == "pool"
        own = await placeholder(world, "box")
        assert await sent(world, "box", own) == SECRET
        await handlers.suspend("box")
        await handlers.resume("box")
        assert await placeholder(world, "box") == own
        await handlers.pool.close()

    play(tmp_path, scene, templates="on")


def test_what_cannot_be_lent(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await define(world)
        await define(world, "twin")
        with pytest.raises(NotFound, match="there is no secret none"):
            await create(world, "box", "none")
        with pytest.raises(InvalidInput, match="the variable API_KEY would be set twice"):
            await create(world, "box", "key", env={"API_KEY": "mine"})
        with pytest.raises(InvalidInput, match="would be set twice: by the secret twin"):
            await create(world, "box", "key", "twin")
        with pytest.raises(InvalidInput, match="cannot be a secret's name"):
            await create(world, "box", "NO SUCH")
        assert (await world.handlers.list()).sandboxes == []
        await create(world, "box", "key", "key")
        answer = await world.handlers.run(RunRequest("echo $API_KEY", ram_mb=RAM_MB, cpus=1, secrets=["key"]))
        assert PLACEHOLDER.fullmatch(answer.stdout.strip().encode())

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (SetSecretRequest(hosts=HOSTS), "either a source or a value"),
        (SetSecretRequest(hosts=HOSTS, source="env:A", value="v"), "either a source or a value"),
        (SetSecretRequest(hosts=["*"], source="env:A"), "may go anywhere"),
        (SetSecretRequest(hosts=HOSTS, value="two\nlines"), "cannot be a secret"),
    ],
)
def test_what_cannot_be_set(tmp_path: Path, request_: SetSecretRequest, why: str) -> None:
    async def scene(world: SimWorld) -> None:
        with pytest.raises(InvalidInput, match=why):
            await world.handlers.secrets.set("key", request_)
        assert (await world.handlers.secrets.list()).secrets == []

    play(tmp_path, scene)


def test_settings_with_a_mistake_leave_everything_as_it_was(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await define(world)
        await create(world, "box", "key")
        own = await placeholder(world, "box")
        settings = tmp_path / "home" / "config.toml"
        good = settings.read_text()
        settings.write_text(good + "[[secret]]\nname = 'broken'\n")
        with pytest.raises(InvalidInput, match="secret broken: source"):
            await world.handlers.host.reload()
        assert await sent(world, "box", own) == SECRET
        settings.write_text(good.replace("api.test", "new.test"))
        await world.handlers.host.reload()
        await refused(world, own, "may go to new.test alone")

    play(tmp_path, scene)
