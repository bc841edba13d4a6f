"""The policy in force, put together from layers, and what must be asked about."""

from __future__ import annotations

import asyncio
from types import MappingProxyType

import pytest

from capsem.egress.asks import ONCE, Asks
from capsem.egress.compose import LARGEST, Layers, compose, effective_preset, layers_from_json
from capsem.egress.document import Document, from_text
from capsem.egress.facts import Action, Layer, Protocol, Subject
from capsem.egress.floor import floor
from capsem.egress.live import LivePolicy
from capsem.egress.presets import Registry, preset_document
from capsem.model.errors import InvalidInput

FLOOR = floor(lambda address: address == "203.0.113.80")
WEB = Subject(443, "a.test")


def text(rule, layer, more=""):
    return from_text(f"[network]\n{more}\n[[network.rule]]\n{rule}\n", layer, f"{layer}.toml")


def composed(own=None, **layers):
    return compose(Layers(**layers), own or Document(), floor=FLOOR, vm="dev")


# -- layers


def test_layers_go_through_json_as_they_are():
    layers = Layers(
        text("name='no'\naction='deny'\nhost='evil.test'", Layer.CORPORATE, "preset='high'"),
        text("action='allow'\nhost='a.test'", Layer.USER, "upstream_proxy='http://u:p@proxy.test:1'"),
        preset_document("open-with-floor", (), ()),
        MappingProxyType({"HTTPS_PROXY": "http://proxy.test:2"}),
    )
    assert layers_from_json(layers.to_json()) == layers
    assert layers_from_json("") == Layers()


@pytest.mark.parametrize("bad", ["{", "[]", '{"user": {"rule": 1}}', '{"environment": 1}', "[" * 9000])
def test_what_is_no_layers(bad):
    with pytest.raises(InvalidInput):
        layers_from_json(bad)


def test_layers_that_would_not_travel_are_refused():
    name = "a" * 60
    rule = f"action='allow'\nhost={[f'{name}{n}.test' for n in range(400)]}"
    document = from_text(f"[[network.rule]]\n{rule}\n" * 4, Layer.USER, "config.toml")
    with pytest.raises(InvalidInput, match=str(LARGEST)):
        Layers(document, document, document, {}).to_json()


def test_what_stands_beside_the_rules_comes_from_the_strongest_layer_that_says_it():
    corporate = from_text(
        "[network]\nextra_ca=['/corp.pem']\nupstream_proxy='http://corp.test:1'", Layer.CORPORATE, "c"
    )
    own = from_text(
        "[network]\nextra_ca=['/own.pem']\notherwise='ask'\nupstream_proxy='none'\n"
        "[network.client_certificate.work]\ncert='/own'\nkey='/own'",
        Layer.VM,
        "o",
    )
    user = from_text(
        "[network]\notherwise='deny'\n[network.client_certificate.work]\ncert='/user'\nkey='/user'\n"
        "[[network.resolve_allow]]\ncidr=['10.0.0.0/8']\n[[network.rule]]\naction='allow'\nhost='a.test'\nclient_certificate='work'",
        Layer.USER,
        "u",
    )
    policy, outside = composed(own, corporate=corporate, user=user, environment={"HTTPS_PROXY": "http://env.test:1"})
    assert outside.extra_ca == ("/corp.pem", "/own.pem")
    assert outside.proxies == {"ALL_PROXY": "http://corp.test:1"}
    assert outside.certificates["work"].cert == "/own"
    assert policy.otherwise is Action.ASK
    assert policy.judge(Subject(443, "a.test", "10.1.1.1")).action is Action.ALLOW
    assert composed(own, user=user)[1].proxies == {}
    assert composed(user=user, environment={"HTTPS_PROXY": "x"})[1].proxies == {"HTTPS_PROXY": "x"}


def test_a_client_certificate_that_nobody_defines():
    own = text("name='r'\naction='allow'\nhost='a.test'\nclient_certificate='work'", Layer.VM)
    with pytest.raises(InvalidInput, match=r"vm.toml, line 3: rule r: there is no client certificate work"):
        composed(own)


def test_the_company_s_preset_holds_for_all_and_a_vm_from_before_has_none():
    corporate = from_text("[network]\npreset='off'", Layer.CORPORATE, "c")
    own = from_text("[network]\npreset='medium'", Layer.VM, "o")
    assert effective_preset(corporate, own) == "off"
    assert effective_preset(Document(), own) == "medium"
    assert effective_preset(Document(), Document()) == "off"


# -- presets

REGISTRIES = (
    Registry("pip", "pypi.corp.test", 443, "/etc/pip.conf"),
    Registry("npm", "npm.corp.test", 8443, "~/.npmrc"),
    Registry("apt", "debian.corp.test", 80, "/etc/apt/sources.list"),
)


def preset(name, subject):
    remembered = text("name='remembered'\naction='allow'\nhost='remembered.test'", Layer.PRESET).rules
    return composed(preset=preset_document(name, REGISTRIES, remembered))[0].judge(subject)


@pytest.mark.parametrize("name", ["off", "high", "medium", "open-with-floor"])
def test_what_the_presets_let_pass(name):
    def passes(host, port=443, method="GET", **more):
        return preset(name, Subject(port, host, method=method, path="/", **more)).action is Action.ALLOW

    assert (
        passes("pypi.corp.test") == passes("debian.corp.test", 80) == passes("npm.corp.test", 8443) == (name != "off")
    )
    assert passes("npm.corp.test", 443) == (name == "open-with-floor")
    assert passes("pypi.corp.test", method="PUT") == (name == "open-with-floor")
    assert passes("remembered.test", method="POST") == (name in {"medium", "open-with-floor"})
    assert passes("other.test") == (name == "open-with-floor")
    raw = Subject(5432, None, "93.184.216.34", Protocol.TCP)
    assert (preset(name, raw).action is Action.ALLOW) == (name == "open-with-floor")
    for private in ("10.0.0.1", "169.254.169.254", "203.0.113.80", "127.0.0.1", "::ffff:10.0.0.1"):
        assert preset(name, Subject(443, "pypi.corp.test", private)).layer is Layer.FLOOR


def test_no_registry_is_known_to_a_preset():
    assert preset_document("medium", (), ()) == Document(preset="medium")


# -- live


def test_a_rule_ends_when_its_time_has_come_and_whoever_wants_to_know_is_told():
    now, told = [100.0], []
    policy, _ = composed(text("action='allow'\nhost='a.test'\nuntil=200", Layer.VM))
    live = LivePolicy(policy, lambda: now[0])
    leave = live.on_change(lambda: told.append(live.version))
    assert (live.judge(WEB).action, live.version) == (Action.ALLOW, 0)
    now[0] = 200.0
    assert live.judge(WEB).action is Action.DENY
    assert live.judge_name("a.test").action is Action.DENY
    assert told == [1]
    live.replace(policy)
    assert live.judge(WEB).policy_version == 3  # and its rule has ended again
    leave()
    live.replace(policy)
    assert told == [1, 2, 3]


# -- asks


class Witness:
    def __init__(self):
        self.seen = []
        self.waits = asyncio.Event()

    def held(self, ask):
        self.seen.append(("held", ask.subject.host))
        self.waits.set()

    def over(self, ask, outcome):
        self.seen.append((outcome, ask.subject.host))


class World:
    def __init__(self, held=60.0):
        self.now = 1000.0
        self.own = text("name='asks'\naction='ask'\nhost='*.test'", Layer.VM)
        self.live = LivePolicy(composed(self.own)[0], lambda: self.now)
        self.asks = Asks(self.live.judge, lambda: self.now, held)
        self.live.on_change(self.asks.changed)
        self.witness = Witness()

    def ask(self, subject=WEB):
        return asyncio.create_task(self.asks.ask(subject, self.live.judge(subject)))


def test_nobody_there_is_a_denial_at_once():
    async def main():
        world = World()
        verdict = await world.ask()
        assert (verdict.action, verdict.rule) == (Action.DENY, "asks")
        assert verdict.reason.endswith("nobody is there to be asked (capsem net asks)")
        assert verdict.remedy == "capsem net allow dev a.test"

    asyncio.run(main())


@pytest.mark.parametrize("allow", [True, False])
def test_one_answer_is_for_all_that_wait_for_the_same_and_holds_for_a_while(allow):
    async def main():
        world = World()
        world.asks.listen(world.witness)
        first, second, other = world.ask(), world.ask(), world.ask(Subject(443, "b.test"))
        await world.witness.waits.wait()
        assert [ask.subject.host for ask in world.asks.waiting()] == ["a.test", "b.test"]
        assert world.asks.answer(None, "a.test", allow=allow) == 1
        action = Action.ALLOW if allow else Action.DENY
        assert (await first).action is (await second).action is action
        assert (await world.ask()).action is action
        assert not other.done()
        world.now += ONCE
        again = world.ask()
        await asyncio.sleep(0)
        assert len(world.asks.waiting()) == 2
        assert world.asks.answer(world.asks.waiting()[0].id, None, allow=False) == 1
        assert (await other).action is Action.DENY
        assert world.asks.answer(None, "a.test", allow=True) == 1
        assert (await again).action is Action.ALLOW
        word = "allowed" if allow else "denied"
        assert world.witness.seen[:3] == [("held", "a.test"), ("held", "b.test"), (word, "a.test")]

    asyncio.run(main())


def test_what_the_policy_decides_by_now_waits_no_more():
    async def main():
        world = World()
        world.asks.listen(world.witness)
        waits = world.ask()
        await world.witness.waits.wait()
        allowed = text("name='now'\naction='allow'\nhost='a.test'", Layer.CORPORATE)
        world.live.replace(composed(world.own, corporate=allowed)[0])
        verdict = await waits
        assert (verdict.action, verdict.rule) == (Action.ALLOW, "now")
        assert world.witness.seen[-1] == ("allowed", "a.test")

    asyncio.run(main())


def test_nobody_answers():
    async def main():
        world = World(held=0.0)
        world.asks.listen(world.witness)
        assert (await world.ask()).reason.endswith("nobody answered within 0 s")
        assert world.witness.seen == [("held", "a.test"), ("unanswered", "a.test")]
        assert world.asks.waiting() == []

    asyncio.run(main())


def test_whoever_could_answer_leaves():
    async def main():
        world = World()
        leave = world.asks.listen(world.witness)
        waits = world.ask()
        await world.witness.waits.wait()
        leave()
        assert (await waits).reason.endswith("whoever was asked is gone")

    asyncio.run(main())


def test_a_request_that_is_given_up_asks_no_more():
    async def main():
        world = World()
        world.asks.listen(world.witness)
        waits = world.ask()
        await world.witness.waits.wait()
        waits.cancel()
        await asyncio.wait((waits,))
        assert world.asks.waiting() == []
        assert world.witness.seen[-1] == ("unanswered", "a.test")

    asyncio.run(main())


def test_a_guest_cannot_have_its_owner_asked_without_end():
    async def main():
        world = World()
        world.asks.listen(world.witness)
        many = [world.ask(Subject(443, f"h{number}.test")) for number in range(70)]
        await asyncio.sleep(0)
        refused = [task for task in many if task.done()]
        assert len(world.asks.waiting()) == 64
        assert len(refused) == 6
        assert "64 other requests" in (await refused[0]).reason
        for task in many:
            task.cancel()
        await asyncio.wait(many)

    asyncio.run(main())
