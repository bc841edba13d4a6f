"""`capsem net`, the SDK's `network`, and the tools of capsem-mcp, against a whole service: what each says, and does."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_world import served_world

import capsem
from capsem.api.network_types import CheckResponse
from capsem.cli.main import main
from capsem.client.events import Decoder, follow
from capsem.client.sync import Client
from capsem.egress.events import NetEvent
from capsem.egress.facts import Action, Subject, TlsMode, Verdict
from capsem.mcp.calls import Service
from capsem.mcp.server import Tools
from capsem.model.errors import BY_CODE, InvalidInput, NotFound, PermissionDenied, WrongState
from capsem.sdk.aio import AsyncSandbox
from capsem.sdk.sync import Sandbox
from service_world import World

SOURCE = str(Path(capsem.__file__).parent.parent)
ASKS = '[[network.rule]]\nname = "asks"\naction = "ask"\nhost = "*.test"\n'
MINE = '[[network.rule]]\nname = "mine"\naction = "allow"\nhost = "a.test"\n'


class Place:
    """A service, and a way around its face."""

    def __init__(self, socket: str, world: World, capsys: Any) -> None:
        self.socket = socket
        self.world = world
        self.client = Client(socket)
        self._capsys = capsys

    def cli(self, *words: str) -> tuple[int, str, str]:
        code = main(["--uds-path", self.socket, "net", *words])
        found = self._capsys.readouterr()
        return code, found.out, found.err

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "capsem", "--uds-path", self.socket, "net", *words]
        environment = {**os.environ, "PYTHONPATH": SOURCE}
        return subprocess.Popen(
            argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )

    def _supervisor(self, name: str) -> Any:
        return self.world.processes.children[self.world.fleet.get(name).pid].supervisor

    def on_loop(self, work: Any) -> Any:
        """The outcome of a coroutine on the service's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self.world.loop).result(30)

    def happened(self, name: str, **facts: Any) -> None:
        known = {
            "domain": "a.test",
            "port": 443,
            "decision": "allowed",
            "method": "GET",
            "path": "/",
            "tls": TlsMode.INTERCEPTED,
        }

        async def record() -> None:
            now = self.world.fleet.system.clock.time()
            self._supervisor(name).recording.traffic.net(NetEvent(time=now, **{**known, **facts}))

        self.on_loop(record())

    def wants(self, name: str, subject: Subject) -> asyncio.Future[Verdict]:
        """A request that waits if it has to."""

        async def ask() -> Verdict:
            policing = self._supervisor(name).policing
            verdict = policing.live.judge(subject)
            return await policing.asks.ask(subject, verdict) if verdict.action is Action.ASK else verdict

        return asyncio.run_coroutine_threadsafe(ask(), self.world.loop)  # type: ignore[return-value]

    def followed(self, name: str) -> None:
        """Wait until somebody listens."""

        async def wait() -> None:
            async with asyncio.timeout(20):
                while not self._supervisor(name).policing.asks.listeners:
                    await asyncio.sleep(0.005)

        self.on_loop(wait())


@pytest.fixture
def place(capsys: Any) -> Iterator[Place]:
    worlds: list[World] = []
    with served_world(worlds) as socket:
        yield Place(socket, worlds[0], capsys)


def create(place: Place, name: str, network: Any = "off") -> Sandbox:
    return Sandbox.create(name, network=network, client=place.client)


# -- the command line


def test_net_on_the_command_line(place: Place, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[network]\npreset = "off"\n{MINE}')
    assert main(["--uds-path", place.socket, "create", "-n", "box", "--net", str(policy)]) == 0
    place.cli()
    code, out, _ = place.cli("show", "box")
    assert code == 0
    assert out.splitlines()[:2] == ["preset: off", "otherwise: deny"]
    assert out.splitlines()[-1].split() == ["vm", "allow", "mine", "a.test"]
    assert place.cli("show", "box", "--policy")[1].startswith('[network]\npreset = "off"\n')
    assert json.loads(place.cli("show", "box", "--json")[1])["own"]["rule"][0]["name"] == "mine"

    code, out, _ = place.cli("allow", "box", "*.b.test:8443", "--for", "1h", "--method", "GET")
    assert (code, out.startswith("box may reach *.b.test until 20")) == (0, True)
    code, out, _ = place.cli("deny", "box", "a.test")
    assert out == "box is kept from a.test\n"
    assert place.cli("allow", "box", "a.test")[1] == (
        "box may reach a.test: rule mine of the vm layer allows it\nit takes the place of rule denied-a.test\n"
    )
    assert (
        place.cli("allow", "box", "a.test")[1] == "box may reach a.test already: rule mine of the vm layer allows it\n"
    )

    code, out, _ = place.cli("check", "https://x.b.test:8443/", "--vm", "box")
    assert (code, out.splitlines()[:3]) == (0, ["allow", "rule: allowed-b.test", "layer: vm"])
    out = place.cli("check", "https://c.test", "--vm", "box", "--method", "PUT")[1]
    assert out.splitlines()[0] == "deny"
    assert out.splitlines()[-1] == "to allow it: capsem net allow box c.test"
    assert json.loads(place.cli("check", "c.test", "--json")[1])["layer"] == "default"

    assert place.cli("set", "box", "open-with-floor")[1].splitlines()[0] == "preset: open-with-floor"
    policy.write_text(ASKS)
    assert json.loads(place.cli("set", "box", str(policy), "--json")[1])["preset"] == "open-with-floor"

    assert place.cli("reload")[1] == "Read again; 1 running VMs have the new policy.\n"
    code, out, err = place.cli("ca", "show")
    assert (out[:27], "SHA-256" in err) == ("-----BEGIN CERTIFICATE-----", True)
    first = json.loads(place.cli("ca", "show", "--json")[1])["fingerprint"]
    assert json.loads(place.cli("ca", "rotate", "--json")[1])["fingerprint"] != first


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["show", "nobody"], 1, "no VM is called nobody"),
        (["show", "../x"], 2, "bad session"),
        (["allow", "box"], 2, "Missing argument 'HOST'"),
        (["allow", "box", "https://a.test"], 2, "a name alone"),
        (["allow", "box", "a.test", "--once", "--always"], 2, "exclude each other"),
        (["allow", "box", "a.test", "--for", "soon"], 2, "is no time"),
        (["allow", "box", "--ask", "77"], 1, "waits for an answer"),
        (["allow", "box", "db.test", "--tcp"], 2, "needs a port"),
        (["deny", "box", "a b"], 2, "is no name of a host"),
        (["set", "box", "wide"], 2, "no preset, and no file"),
        (["set", "box", "/"], 2, "no preset, and no file"),
        (["check", "ftp://a.test"], 2, "is no URL that is judged"),
        (["check", "a.test", "--vm", "nobody"], 1, "no VM is called nobody"),
        (["log", "nobody"], 1, "no VM is called nobody"),
        (["log", "box", "--since", "whenever"], 2, "whenever"),
        (["learn", "box"], 2, "say start, stop or show"),
        (["learn", "begin", "box"], 2, "say start, stop or show"),
        (["learn", "stop", "box"], 1, "is not learning"),
        (["learn", "start", "box", "--since", "1h"], 2, "since is for denials"),
        (["asks", "--vm", "nobody"], 1, "no VM is called nobody"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_bad_words(place: Place, words: list[str], code: int, told: str) -> None:
    create(place, "box")
    found = place.cli(*words)
    assert (found[0], found[1]) == (code, "")
    assert told in found[2]
    assert "Traceback" not in found[2]
    assert create(place, "other").network.info().own == Sandbox("box", client=place.client).network.info().own


def test_lint_on_the_command_line(place: Place, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(MINE)
    assert place.cli("lint", str(policy)) == (0, "Nothing is wrong with it.\n", "")
    policy.write_text(MINE + 'hots = "b.test"\n')
    code, out, _ = place.cli("lint", str(policy))
    assert (code, out.startswith(f"{policy}, line 5: rule mine: there is no key hots; there are: name, action")) == (
        1,
        True,
    )
    assert json.loads(place.cli("lint", str(policy), "--json")[1])["valid"] is False


def test_the_log_is_followed(place: Place) -> None:
    create(place, "box")
    assert place.cli("log", "box")[1] == "Nothing yet.\n"
    place.happened("box", path="/one", process_name="curl", matched_rule="mine", rule_layer="vm", status_code=200)
    place.happened(
        "box", method=None, path=None, decision="error", error="tls_client_refused: unknown_ca", domain="p.test"
    )
    code, out, err = place.cli("log", "box")
    assert code == 0
    head, one, two = out.splitlines()
    assert head.split() == ["TIME", "DECISION", "STATUS", "RULE", "WHAT"]
    assert one.split()[1:] == ["allowed", "200", "vm/mine", "GET", "a.test:443/one", "curl"]
    assert "p.test:443" in two
    assert 'protocol = "passthrough"' in err
    (newest,) = place.cli("log", "box", "--json", "--limit", "1")[1].splitlines()
    assert json.loads(newest)["domain"] == "p.test"
    following = place.start("log", "box", "-f", "--json")
    try:
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["path"] == "/one"
        following.stdout.readline()
        place.happened("box", path="/two")
        assert json.loads(following.stdout.readline())["path"] == "/two"
    finally:
        following.kill()
        following.communicate()


def test_what_a_guest_calls_itself_does_nothing_to_a_terminal(place: Place) -> None:
    create(place, "box")
    place.happened("box", process_name="\x1b]0;owned\x07ev\nil", path="/\x1b[2J")
    out = place.cli("log", "box")[1]
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


def test_learning_on_the_command_line(place: Place, tmp_path: Path) -> None:
    create(place, "box")
    assert "is learning" in place.cli("learn", "start", "box")[1]
    assert "learning: " in place.cli("show", "box")[1]
    place.happened("box", method="POST", path="/v1", process_name="curl")
    assert "# 1 request, first by curl" in place.cli("learn", "show", "box", "--paths")[1]
    file = tmp_path / "policy.toml"
    assert (
        place.cli("learn", "stop", "box", "-o", str(file))[1] == f"{file}: a policy from 1 requests and connections\n"
    )
    assert main(["--uds-path", place.socket, "create", "-n", "fresh", "--net", str(file)]) == 0
    place.cli()
    assert place.cli("check", "https://a.test/x", "--method", "POST", "--vm", "fresh")[1].startswith("allow\n")
    assert place.cli("check", "https://a.test/x", "--vm", "fresh")[1].startswith("deny\n")
    place.happened("box", decision="denied", domain="later.test", rule_layer="default")
    assert 'host = ["later.test"]' in place.cli("learn", "--from-log", "box")[1]
    assert json.loads(place.cli("learn", "--from-log", "box", "--json")[1])["events"] == 1


def test_asks_on_the_command_line(place: Place) -> None:
    create(place, "box", ASKS)
    assert place.cli("asks", "--now")[1] == "Nothing waits. Nobody listens, so everything is denied.\n"
    asking = place.start("asks", "--json")
    try:
        place.followed("box")
        waits = place.wants("box", Subject(443, "a.test", method="GET", path="/x"))
        assert asking.stdout is not None
        event = json.loads(asking.stdout.readline())
        assert {key: event[key] for key in ("event", "id", "host", "method", "path")} == {
            "event": "ask",
            "id": "box",
            "host": "a.test",
            "method": "GET",
            "path": "/x",
        }
        out = place.cli("asks", "--now")[1]
        assert out.splitlines()[1].split()[:4] == ["box", event["ask"], "GET", "a.test:443/x"]
        assert place.cli("allow", "box", "--ask", event["ask"])[1] == "allowed, for once\n"
        assert waits.result(20).action is Action.ALLOW
        assert json.loads(asking.stdout.readline())["outcome"] == "allowed"
    finally:
        asking.kill()
        asking.communicate()


# -- the SDK


def test_the_network_of_a_sandbox(place: Place) -> None:
    box = create(place, "box", {"preset": "off", "rule": [{"name": "mine", "action": "allow", "host": "a.test"}]})
    assert [rule["name"] for rule in box.network.info().rules] == ["mine"]
    verdict: CheckResponse = box.network.check("https://b.test", "POST")
    assert (verdict.action, verdict.remedy) == ("deny", "capsem net allow box b.test")
    assert box.network.allow("b.test", port=8443, methods=["GET"], for_secs=60).rule is not None
    assert box.network.check("https://b.test:8443").action == "allow"
    assert box.network.deny("a.test").removed == []
    assert box.network.check("https://a.test").rule == "denied-a.test"
    assert box.network.set("open-with-floor").preset == "open-with-floor"
    assert box.network.set(f'[network]\npreset = "off"\n{MINE}').own["rule"][0]["name"] == "mine"
    with pytest.raises(InvalidInput, match=r"policy, line 2: rule rule-1: there is no key hosts"):
        box.network.set("[[network.rule]]\nhosts = 1\n")
    with pytest.raises(InvalidInput):
        create(place, "bad", "no-preset = 1\n[network]\nx = 1\n")
    with pytest.raises(NotFound):
        Sandbox("bad", client=place.client).network.info()
    (place.world.layout.run_dir / "corp.toml").write_text('[[network.rule]]\naction = "deny"\nhost = "evil.test"\n')
    place.client.call("reload_config")
    with pytest.raises(PermissionDenied):
        box.network.allow("evil.test")
    box.network.learn()
    place.happened("box", path="/v1")
    assert box.network.log(decision="allowed")[-1]["path"] == "/v1"
    assert box.network.log(after=box.network.log()[-1]["id"]) == []
    assert "a.test" in (box.network.learnt(stop=False).policy or "")
    assert "/v1" in (box.network.learnt(paths=True).policy or "")
    with pytest.raises(WrongState):
        box.network.learnt()
    assert box.network.learn_from_log(since="1h").events == 0
    assert box.network.asks() == []
    with pytest.raises(WrongState):
        box.network.answer("1", allow=True)


def test_the_network_of_an_async_sandbox(place: Place) -> None:
    async def scene() -> None:
        async with await AsyncSandbox.create(network="off", client=place.client) as box:
            assert (await box.network.info()).preset == "off"
            await box.network.allow("a.test")
            assert (await box.network.check("https://a.test")).action == "allow"
            await box.network.deny("a.test")
            assert (await box.network.set(MINE)).own["rule"][0]["name"] == "mine"
            await box.network.learn()
            place.happened(box.id)
            assert (await box.network.learnt()).events == 1
            assert len(await box.network.log()) == 1
            assert (await box.network.learn_from_log()).events == 0
            assert await box.network.asks() == []
            with pytest.raises(WrongState):
                await box.network.answer("1", allow=False)

    asyncio.run(scene())


# -- events


def test_events_are_decoded_however_they_are_cut() -> None:
    data = b': hello\n\nevent: ask\ndata: {"a": 1}\n\n:\n\nevent: over\ndata: {"b": "x: y"}\n\ndata: {}\n\n'
    whole = [("ask", {"a": 1}), ("over", {"b": "x: y"}), ("message", {})]
    assert Decoder().feed(data) == whole
    one_at_a_time = Decoder()
    assert [event for byte in data for event in one_at_a_time.feed(bytes([byte]))] == whole


def test_following_events_of_nobody_is_refused(place: Place) -> None:
    with pytest.raises(NotFound):
        next(follow(place.client, "network_events", {"id": "nobody"}))
    with pytest.raises(InvalidInput):
        next(follow(place.client, "network_events", {"id": "../x"}))


# -- the tools


class Agent:
    """Calls tools as the MCP server does."""

    def __init__(self, socket: str) -> None:
        self._tools = Tools(Service(Client(socket)))

    async def call(self, tool: str, **arguments: Any) -> Any:
        found = self._tools._tools[f"capsem_{tool}"]
        return await self._tools._do(found, arguments)


def test_the_network_tools(place: Place) -> None:
    async def scene() -> None:
        agent = Agent(place.socket)
        await agent.call("create", name="box", network="off")
        assert (await agent.call("network", id="box"))["preset"] == "off"
        await agent.call("network_set", id="box", policy=ASKS)
        assert (await agent.call("network_check", url="https://a.test", id="box"))["action"] == "ask"
        assert (await agent.call("network_allow", id="box", host="b.example", seconds=60))["rule"]["host"] == [
            "b.example"
        ]
        await agent.call("network_deny", id="box", host="c.example")
        place.happened("box")
        assert (await agent.call("network_log", id="box", limit=1))["events"][0]["domain"] == "a.test"
        assert "policy" in await agent.call("network_learn", id="box", action="denials")
        assert await agent.call("network_asks") == {"asks": [], "followers": 1}
        await asyncio.to_thread(place.followed, "box")
        waits = place.wants("box", Subject(443, "a.test"))
        (ask,) = (await agent.call("network_asks", wait=20))["asks"]
        await agent.call("network_allow", id="box", ask=ask["ask"])
        assert (await asyncio.wrap_future(waits)).action is Action.ALLOW  # type: ignore[arg-type]
        for tool, arguments in (
            ("network", {"id": "nobody"}),
            ("network_set", {"id": "box", "preset": "wide"}),
            ("network_set", {"id": "box", "policy": "["}),
            ("network_allow", {"id": "box"}),
            ("network_allow", {"id": "box", "host": "https://x"}),
            ("network_allow", {"id": "box", "host": "a.test", "seconds": -1}),
            ("network_deny", {"id": "box", "ask": "99"}),
            ("network_check", {"url": "ftp://a.test"}),
            ("network_log", {"id": "box", "limit": 0}),
            ("network_log", {"id": "box", "decision": "maybe"}),
            ("network_learn", {"id": "box", "action": "forget"}),
            ("create", {"name": "bad", "network": "wide"}),
        ):
            with pytest.raises(tuple(BY_CODE.values())):
                await agent.call(tool, **arguments)

    asyncio.run(scene())
