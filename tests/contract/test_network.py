"""What VMs may reach, from the service to the supervisor: guests are processes, and send nothing; the judge is asked instead."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from capsem.api.network_types import (
    AllowRequest,
    AsksQuery,
    CheckQuery,
    DenyRequest,
    LearnRequest,
    NetworkLogQuery,
    NetworkRequest,
)
from capsem.api.vm_types import ForkRequest, PersistRequest, ProvisionRequest
from capsem.egress.events import NetEvent
from capsem.egress.facts import Action, Layer, Protocol, Subject, TlsMode
from capsem.model.errors import (
    InvalidInput,
    LimitReached,
    MachineFailed,
    NotFound,
    PermissionDenied,
    WrongState,
)
from service_world import World, play

WEB = Subject(443, "a.test")
RULE = '[[network.rule]]\nname = "{name}"\naction = "{action}"\nhost = "{host}"\n'


def rule(name, action="allow", host="a.test", **more):
    text = RULE.format(name=name, action=action, host=host)
    return text + "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())


def policing(it: World, name: str):
    """That of the VM's supervisor."""
    return it.processes.children[it.fleet.get(name).pid].supervisor.policing


def verdict(it: World, name: str, subject: Subject = WEB):
    return policing(it, name).live.judge(subject)


async def create(it: World, name: str, network=None, **more):
    await it.handlers.provision(ProvisionRequest(name=name, persistent=True, network=network, **more))


def home(it: World) -> Path:
    return it.layout.run_dir


# -- making VMs


def test_a_new_vm_has_the_preset_of_the_settings_or_what_it_is_given(tmp_path):
    async def scene(it):
        it.handlers.network._preset = lambda: "high"
        await create(it, "plain")
        await create(it, "open", "open-with-floor")
        await create(it, "own", NetworkRequest(policy=f'[network]\npreset = "off"\n{rule("mine")}'))
        await create(
            it, "table", NetworkRequest(preset="off", policy={"rule": [{"action": "allow", "host": "a.test"}]})
        )
        assert (await it.handlers.network.show("plain")).preset == "high"
        assert verdict(it, "plain").action is Action.DENY
        assert verdict(it, "open").rule == "open-names-http"
        assert verdict(it, "own").rule == "mine"
        assert verdict(it, "table").rule == "rule-1"
        shown = await it.handlers.network.show("own")
        assert shown.policy == f'[network]\npreset = "off"\n\n{rule("mine")}'.replace('"a.test"', '["a.test"]')
        assert [(each["name"], each["layer"]) for each in shown.rules] == [("mine", "vm")]

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "bad",
    [
        "wide",
        NetworkRequest(preset="wide"),
        NetworkRequest(policy="[network"),
        NetworkRequest(policy=rule("x", host="10.0.0.1")),
        NetworkRequest(policy={"rules": []}),
        NetworkRequest(policy=rule("w", "deny", "*.a.test") + rule("n", host="b.a.test")),
        NetworkRequest(policy={"rule": [{"action": "allow", "host": "a.test", "client_certificate": "x"}]}),
    ],
)
def test_a_bad_policy_makes_no_vm(tmp_path, bad):
    async def scene(it):
        with pytest.raises(InvalidInput):
            await create(it, "box", bad)
        if not isinstance(bad, str) and bad.policy and "client_certificate" in str(bad.policy):
            return
        with pytest.raises(NotFound):
            it.fleet.get("box")

    play(tmp_path, scene)


def test_a_vm_from_before_reaches_nothing_until_somebody_says_so(tmp_path):
    async def scene(it):
        await create(it, "old", "open-with-floor")
        await it.handlers.stop("old")
        it.fleet.get("old").rewrite(network={})
        assert b"network" not in it.fleet.get("old").session.record.read_bytes()
        await it.handlers.resume("old")
        assert verdict(it, "old").layer is Layer.DEFAULT
        assert (await it.handlers.network.show("old")).preset == "off"
        await it.handlers.network.set("old", NetworkRequest(preset="open-with-floor"))
        assert verdict(it, "old").action is Action.ALLOW

    play(tmp_path, scene)


# -- policy by value


def test_forks_and_copies_have_the_policy_of_their_source_and_each_its_own_from_there(tmp_path):
    async def scene(it):
        await create(it, "one", NetworkRequest(preset="off", policy=rule("mine")))
        await it.handlers.fork("one", ForkRequest(name="two"))
        await create(it, "three", from_="one")
        await create(it, "four", "off", from_="one")
        await it.handlers.network.deny("one", DenyRequest(host="a.test"))
        await it.handlers.resume("two")
        assert verdict(it, "one").rule == "denied-a.test"
        assert verdict(it, "two").rule == verdict(it, "three").rule == "mine"
        assert verdict(it, "four").rule == "mine"  # off beneath the rules that it has
        assert verdict(it, "two", Subject(443, "b.test")).remedy == "capsem net allow two b.test"

    play(tmp_path, scene)


def test_a_vm_that_gets_another_name_is_called_by_that_in_commands(tmp_path):
    async def scene(it):
        made = await it.handlers.provision(ProvisionRequest(network="off"))
        await it.handlers.persist(made.id, PersistRequest(name="kept"))
        assert verdict(it, "kept").remedy == "capsem net allow kept a.test"
        await it.handlers.network.allow("kept", AllowRequest(host="a.test"))
        assert verdict(it, "kept").action is Action.ALLOW

    play(tmp_path, scene)


def test_what_is_changed_holds_at_once_and_after_a_restart_of_vm_and_service(tmp_path):
    async def scene(it):
        await create(it, "box", "off")
        before = policing(it, "box").live.version
        answer = await it.handlers.network.allow("box", AllowRequest(host="*.test"))
        assert answer.rule == {"name": "allowed-test", "action": "allow", "host": ["*.test"], "port": [80, 443]}
        assert verdict(it, "box").policy_version == before + 1
        await it.restart()
        assert verdict(it, "box").rule == "allowed-test"
        await it.handlers.stop("box")
        await it.handlers.network.deny("box", DenyRequest(host="b.test:443"))
        await it.handlers.resume("box")
        assert verdict(it, "box").rule == "allowed-test"
        assert verdict(it, "box", Subject(443, "b.test")).rule == "denied-b.test"

    play(tmp_path, scene)


# -- hosts


def test_allow_and_deny_change_their_mind_and_say_what_became_of_what_was_there(tmp_path):
    async def scene(it):
        network = it.handlers.network
        await create(it, "box", NetworkRequest(preset="off", policy=rule("narrow", method=["GET"], port=443)))
        denied = await network.deny("box", DenyRequest(host="a.test"))
        assert denied.rule == {"name": "denied-a.test", "action": "deny", "host": ["a.test"]}
        assert verdict(it, "box", Subject(22, "a.test", protocol=Protocol.TCP)).rule == "denied-a.test"
        allowed = await network.allow("box", AllowRequest(host="a.test"))
        assert set(allowed.removed) == {"denied-a.test", "narrow"}
        assert verdict(it, "box").rule == "allowed-a.test"
        again = await network.allow("box", AllowRequest(host="a.test"))
        assert (again.rule, again.message.split(":")[0]) == (None, "box may reach a.test already")
        await network.deny("box", DenyRequest(host="*.a.test"))
        await network.allow("box", AllowRequest(host="*.a.test"))
        assert (await network.show("box")).own["rule"] == [
            {"name": "allowed-a.test", "action": "allow", "host": ["a.test"], "port": [80, 443]},
            {"name": "allowed-a.test-2", "action": "allow", "host": ["*.a.test"], "port": [80, 443]},
        ]
        raw = await network.allow("box", AllowRequest(host="192.168.7.9:5432", tcp=True))
        assert raw.rule["cidr"] == ["192.168.7.9/32"]
        assert verdict(it, "box", Subject(5432, None, "192.168.7.9", Protocol.TCP)).action is Action.ALLOW
        assert verdict(it, "box", Subject(5433, None, "192.168.7.9", Protocol.TCP)).layer is Layer.FLOOR
        # What people made by hand goes back as a file without complaint.
        await network.set("box", NetworkRequest(policy=(await network.show("box")).policy))

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "bad",
    [
        AllowRequest(host=""),
        AllowRequest(host="https://a.test"),
        AllowRequest(host="a.test:0"),
        AllowRequest(host="a.test:80", port=81),
        AllowRequest(host="db.test", tcp=True),
        AllowRequest(host="a b"),
        AllowRequest(host="a.test", method=["get"]),
    ],
)
def test_what_cannot_be_allowed_changes_nothing(tmp_path, bad):
    async def scene(it):
        await create(it, "box", "off")
        with pytest.raises(InvalidInput):
            await it.handlers.network.allow("box", bad)
        assert (await it.handlers.network.show("box")).own == {"preset": "off"}

    play(tmp_path, scene)


def test_what_the_company_says_is_not_for_the_user_to_change(tmp_path):
    async def scene(it):
        (home(it) / "corp.toml").write_text(rule("never", "deny", "evil.test") + rule("always", host="good.test"))
        it.handlers.policies.load()
        await create(it, "box", "off")
        with pytest.raises(PermissionDenied, match="rule never of the corporate layer denies"):
            await it.handlers.network.allow("box", AllowRequest(host="evil.test"))
        with pytest.raises(PermissionDenied, match="stays allowed: rule always of the corporate layer"):
            await it.handlers.network.deny("box", DenyRequest(host="good.test"))
        own = NetworkRequest(policy=rule("mine", "deny", "*.b.test"))
        await it.handlers.network.set("box", own)
        with pytest.raises(WrongState, match="capsem net show"):
            await it.handlers.network.allow("box", AllowRequest(host="x.b.test"))

    play(tmp_path, scene)


def test_for_a_while_ends_by_itself(tmp_path):
    async def scene(it):
        await create(it, "box", "off")
        answer = await it.handlers.network.allow("box", AllowRequest(host="a.test", for_secs=3600))
        assert "until" in answer.message
        live = policing(it, "box").live
        assert live.judge(WEB).action is Action.ALLOW
        now, live._now = live._now(), lambda: now + 3601
        assert live.judge(WEB).action is Action.DENY

    play(tmp_path, scene)


def test_always_is_for_all_that_have_the_preset_medium_now_and_later(tmp_path):
    async def scene(it):
        await create(it, "box", "medium")
        await create(it, "other", "medium")
        await create(it, "strict", "off")
        await it.handlers.network.allow("box", AllowRequest(host="a.test:8443", always=True))
        there = Subject(8443, "a.test")
        assert verdict(it, "box", there).layer is Layer.VM
        assert (verdict(it, "other", there).rule, verdict(it, "other", there).layer) == ("always-a.test", Layer.PRESET)
        assert verdict(it, "strict", there).action is Action.DENY
        assert 'host = ["a.test"]' in (home(it) / "allowed.toml").read_text()
        await it.restart()
        it.handlers.policies.load()
        await create(it, "later", "medium")
        assert verdict(it, "later", there).action is Action.ALLOW

    play(tmp_path, scene)


def test_a_policy_does_not_grow_without_end(tmp_path):
    async def scene(it):
        rules = [{"action": "allow", "host": f"h{number}.test"} for number in range(2000)]
        await create(it, "box", NetworkRequest(preset="off", policy={"rule": rules}))
        with pytest.raises(LimitReached):
            await it.handlers.network.allow("box", AllowRequest(host="one-more.test"))

    play(tmp_path, scene)


# -- reload


def test_files_that_were_edited_reach_every_vm_that_runs(tmp_path):
    async def scene(it):
        await create(it, "one", "off")
        await create(it, "two", "off")
        await create(it, "three", "off")
        await it.handlers.stop("three")
        (home(it) / "config.toml").write_text(rule("mine"))
        answer = await it.handlers.host.reload()
        assert (answer.success, answer.reloaded) == (True, 2)
        assert verdict(it, "one").rule == verdict(it, "two").rule == "mine"
        (home(it) / "config.toml").write_text(rule("mine") + rule("", "deny"))
        with pytest.raises(InvalidInput, match=r"config.toml, line 6: rule rule-2: name: '' is no name"):
            await it.handlers.host.reload()
        assert verdict(it, "one").rule == "mine"
        await it.handlers.resume("three")
        assert verdict(it, "three").rule == "mine"

    play(tmp_path, scene)


def test_a_vm_that_cannot_be_told_keeps_what_it_has_and_no_other_from_the_new_policy(tmp_path):
    async def scene(it):
        await create(
            it,
            "one",
            NetworkRequest(
                preset="off",
                policy=f"{rule('c', client_certificate='work')}",
            ),
        ) if False else None
        (home(it) / "config.toml").write_text("[network.client_certificate.work]\ncert = '/c'\nkey = '/k'\n")
        await it.handlers.host.reload()
        await create(it, "one", NetworkRequest(preset="off", policy=rule("mine", client_certificate="work")))
        await create(it, "two", "off")
        (home(it) / "config.toml").write_text(rule("users", host="b.test"))
        with pytest.raises(MachineFailed, match=r"one: .*there is no client certificate work"):
            await it.handlers.host.reload()
        assert verdict(it, "one").certificate == "work"
        assert verdict(it, "two", Subject(443, "b.test")).rule == "users"

    play(tmp_path, scene)


# -- asks


class Client:
    """Follows the events, as the HTTP route does."""

    def __init__(self, it: World, vm: str | None = None) -> None:
        self._events = it.handlers.asks.follow(vm)
        self.seen: list[tuple[str, dict]] = []

    async def next(self):
        async for chunk in self._events:
            lines = [line for line in chunk.decode().splitlines() if line and not line.startswith(":")]
            if lines:
                name, data = (line.split(": ", 1)[1] for line in lines)
                return name, json.loads(data)
        return None

    async def connected(self, it: World, *names: str):
        first = asyncio.ensure_future(self._events.__anext__())
        assert (await first).startswith(b":")
        async with asyncio.timeout(10):
            while any(not policing(it, name).asks.listeners for name in names):
                await asyncio.sleep(0)

    async def leave(self):
        await self._events.aclose()


def asking(it: World, name: str, subject: Subject = WEB):
    asks = policing(it, name).asks
    return asyncio.create_task(asks.ask(subject, verdict(it, name, subject)))


ASKS = NetworkRequest(preset="off", policy=rule("asks", "ask", "*.test"))


@pytest.mark.parametrize("how", ["once", "by ask", "for a while", "deny"])
def test_a_held_request_is_told_and_answered(tmp_path, how):
    async def scene(it):
        network = it.handlers.network
        await create(it, "box", ASKS)
        client = Client(it)
        await client.connected(it, "box")
        waits = asking(it, "box", Subject(443, "a.test", method="GET", path="/x"))
        name, ask = await client.next()
        assert name == "ask"
        assert {key: ask[key] for key in ("id", "host", "port", "method", "path", "rule", "remedy")} == {
            "id": "box",
            "host": "a.test",
            "port": 443,
            "method": "GET",
            "path": "/x",
            "rule": "asks",
            "remedy": "capsem net allow box a.test",
        }
        listed = await it.handlers.asks.answered(AsksQuery())
        assert ([each.host for each in listed.asks], listed.followers) == (["a.test"], 1)
        if how == "once":
            answer = await network.allow("box", AllowRequest(host="a.test", once=True))
        elif how == "by ask":
            answer = await network.allow("box", AllowRequest(ask=ask["ask"]))
        elif how == "deny":
            answer = await network.deny("box", DenyRequest(host="a.test", once=True))
        else:
            answer = await network.allow("box", AllowRequest(host="a.test", for_secs=60))
            assert answer.rule["answers"]
        assert how == "for a while" or answer.answered == 1
        action = Action.DENY if how == "deny" else Action.ALLOW
        assert (await waits).action is action
        assert (await client.next())[1]["outcome"] == ("allowed" if action is Action.ALLOW else "denied")
        assert (await it.handlers.asks.answered(AsksQuery(id="box"))).asks == []
        await client.leave()

    play(tmp_path, scene)


def test_without_anybody_who_follows_nothing_waits_and_those_of_one_vm_are_about_that_alone(tmp_path):
    async def scene(it):
        await create(it, "box", ASKS)
        await create(it, "other", ASKS)
        assert "nobody is there" in (await asking(it, "box")).reason
        with pytest.raises(WrongState, match="waits for an answer"):
            await it.handlers.network.allow("box", AllowRequest(host="a.test", once=True))
        with pytest.raises(NotFound):
            it.handlers.asks.follow("nobody")
        client = Client(it, "box")
        await client.connected(it, "box")
        assert "nobody is there" in (await asking(it, "other")).reason
        waits = asking(it, "box")
        await client.next()
        await client.leave()
        assert "whoever was asked is gone" in (await waits).reason

    play(tmp_path, scene)


def test_vms_that_come_later_are_followed_too_and_who_comes_later_is_told_what_waits(tmp_path):
    async def scene(it):
        client = Client(it)
        await client.connected(it)
        await create(it, "box", ASKS)
        async with asyncio.timeout(10):
            while not policing(it, "box").asks.listeners:
                await asyncio.sleep(0)
        waits = asking(it, "box")
        assert (await client.next())[0] == "ask"
        second = Client(it)
        assert (await second.next())[1]["host"] == "a.test"
        await it.handlers.stop("box")
        assert (await it.handlers.asks.answered(AsksQuery())).asks == []
        waits.cancel()
        await asyncio.wait((waits,))
        await it.handlers.asks.close()
        assert await client.next() is None

    play(tmp_path, scene)


# -- log and learn


def happened(it: World, name: str, **facts) -> None:
    recording = it.processes.children[it.fleet.get(name).pid].supervisor.recording
    known = {
        "domain": "a.test",
        "port": 443,
        "decision": "allowed",
        "method": "GET",
        "path": "/",
        "tls": TlsMode.INTERCEPTED,
    }
    recording.traffic.net(NetEvent(time=it.fleet.system.clock.time(), **{**known, **facts}))


def test_the_log_is_followed_without_missing_anything(tmp_path):
    async def scene(it):
        await create(it, "box", "off")
        for number in range(5):
            happened(it, "box", path=f"/{number}", decision="denied" if number % 2 else "allowed")
        first = await it.handlers.network.log("box", NetworkLogQuery(limit=2))
        assert [event["path"] for event in first.events] == ["/3", "/4"]
        denied = await it.handlers.network.log("box", NetworkLogQuery(decision="denied, error"))
        assert [event["path"] for event in denied.events] == ["/1", "/3"]
        happened(it, "box", path="/5")
        happened(it, "box", path="/6")
        more = await it.handlers.network.log("box", NetworkLogQuery(after=first.last, limit=1))
        assert [event["path"] for event in more.events] == ["/5"]
        rest = await it.handlers.network.log("box", NetworkLogQuery(after=more.last))
        assert [event["path"] for event in rest.events] == ["/6"]
        assert (await it.handlers.network.log("box", NetworkLogQuery(after=rest.last))).last == rest.last
        with pytest.raises(InvalidInput, match="there is no decision"):
            await it.handlers.network.log("box", NetworkLogQuery(decision="maybe"))

    play(tmp_path, scene)


def test_what_is_learnt_lets_another_vm_do_the_same_and_no_more(tmp_path):
    async def scene(it):
        network = it.handlers.network
        await create(it, "box", NetworkRequest(preset="off", policy=rule("never", "deny", "evil.test")))
        happened(it, "box", domain="before.test")
        started = await network.learn("box", LearnRequest(action="start"))
        assert started.learning
        assert verdict(it, "box").reason.startswith("learning: ")
        assert verdict(it, "box", Subject(443, "evil.test")).rule == "never"
        assert verdict(it, "box", Subject(443, "a.test", "10.0.0.1")).layer is Layer.FLOOR
        happened(it, "box", method="POST", path="/v1/x", process_name="curl")
        happened(it, "box", domain="b.test", port=5432, method=None, path=None, tls=TlsMode.NONE)
        happened(it, "box", domain="evil.test", decision="denied", rule_layer="vm", matched_rule="never")
        await it.handlers.stop("box")
        await it.handlers.resume("box")
        assert verdict(it, "box").reason.startswith("learning: ")  # a restart does not end it
        shown = await network.learn("box", LearnRequest(action="show", paths=True))
        assert (shown.learning, "/v1/x" in shown.policy) == (True, True)
        stopped = await network.learn("box", LearnRequest(action="stop"))
        assert (stopped.learning, stopped.events) == (False, 2)
        assert verdict(it, "box").layer is Layer.DEFAULT
        await create(it, "fresh", NetworkRequest(policy=stopped.policy))
        assert verdict(it, "fresh", Subject(443, "a.test", method="POST", path="/y")).action is Action.ALLOW
        assert verdict(it, "fresh", Subject(443, "a.test", method="GET", path="/y")).action is Action.DENY
        assert verdict(it, "fresh", Subject(5432, "b.test", protocol=Protocol.TCP)).action is Action.ALLOW
        for host in ("before.test", "evil.test", "c.test"):
            assert verdict(it, "fresh", Subject(443, host)).action is Action.DENY
        with pytest.raises(WrongState, match="learn start"):
            await network.learn("box", LearnRequest(action="stop"))

    play(tmp_path, scene)


def test_a_policy_for_what_was_denied(tmp_path):
    async def scene(it):
        await create(it, "box", "off")
        happened(it, "box", decision="denied", rule_layer="default")
        happened(it, "box", decision="denied", rule_layer="floor", domain="inner.test", address="10.0.0.1")
        await it.handlers.stop("box")
        learnt = await it.handlers.network.learn("box", LearnRequest(action="denials", since="1h"))
        assert (learnt.events, learnt.left_out) == (1, ["inner.test:443 is below the floor (1 times)"])
        assert "# Left out: inner.test:443 is below the floor (1 times)" in learnt.policy
        await it.handlers.network.set("box", NetworkRequest(policy=learnt.policy))
        await it.handlers.resume("box")
        assert verdict(it, "box").action is Action.ALLOW

    play(tmp_path, scene)


def test_nothing_is_learnt_where_nothing_is_recorded(tmp_path):
    async def scene(it):
        await create(it, "box", "off")
        it.fleet.ledger = False
        with pytest.raises(WrongState, match=r"vm\.ledger"):
            await it.handlers.network.learn("box", LearnRequest(action="start"))

    play(tmp_path, scene)


# -- a record that somebody has spoilt


def test_a_record_whose_policy_cannot_be_read_denies_everything_and_says_so(tmp_path):
    async def scene(it):
        await create(it, "box", "open-with-floor")
        await it.handlers.stop("box")
        vm = it.fleet.get("box")
        vm.rewrite(network={"preset": "open-with-floor", "of a newer version": 1})
        with pytest.raises(InvalidInput, match="of a newer version"):
            await it.handlers.network.show("box")
        await it.handlers.resume("box")
        assert verdict(it, "box").action is Action.DENY
        await it.handlers.network.set("box", NetworkRequest(preset="open-with-floor"))
        assert verdict(it, "box").action is Action.ALLOW

    play(tmp_path, scene)


def test_check_is_about_a_vm_or_one_that_would_be_made(tmp_path):
    async def scene(it):
        it.handlers.network._preset = lambda: "off"
        await create(it, "box", NetworkRequest(preset="off", policy=rule("mine", path=["/v1/**"])))
        answer = await it.handlers.network.check(CheckQuery(url="https://a.test/v1/x", id="box"))
        assert (answer.action, answer.rule, answer.layer, answer.where) == ("allow", "mine", "vm", "the policy of box")
        answer = await it.handlers.network.check(CheckQuery(url="https://a.test/v2", id="box"))
        assert (answer.action, answer.remedy) == ("deny", "capsem net allow box a.test")
        assert (await it.handlers.network.check(CheckQuery(url="https://a.test/v1/x"))).action == "deny"

    play(tmp_path, scene)
