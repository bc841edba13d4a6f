from __future__ import annotations

import pytest

from capsem.egress.facts import Action, Layer, Protocol, Subject
from capsem.egress.paths import PathPattern, normalise, readings
from capsem.egress.policy import FloorHit, Policy, ResolveAllow
from capsem.egress.rules import Rule, host_pattern, network


def rule(name="r", action="allow", layer=Layer.USER, host=(), port=(), method=(), path=(), cidr=(), **more):
    action = Action(action)
    more.setdefault("protocol", None if action is Action.DENY else Protocol.HTTP)
    if isinstance(more["protocol"], str):
        more["protocol"] = Protocol(more["protocol"])
    hosts = (host,) if isinstance(host, str) else tuple(host)
    return Rule(
        name,
        action,
        layer,
        tuple(host_pattern(each) for each in hosts),
        tuple(port),
        tuple(method),
        tuple(PathPattern(each) for each in path),
        tuple(network(each) for each in cidr),
        **more,
    )


def private_floor(address):
    if address.is_loopback:
        return FloorHit("this host")
    return FloorHit("a private address", excusable=True) if address.is_private else None


def judge(rules, host="example.com", port=443, floor=private_floor, **more):
    subject = {key: more.pop(key) for key in ("address", "protocol", "method", "path") if key in more}
    return Policy(tuple(rules), floor=floor, vm="dev", **more).judge(Subject(port, host, **subject))


def test_what_no_rule_is_about_is_denied_and_the_command_that_allows_it_is_named():
    verdict = judge([])
    assert (verdict.action, verdict.layer, verdict.rule) == (Action.DENY, Layer.DEFAULT, "default")
    assert verdict.remedy == "capsem net allow dev example.com"
    assert verdict.reason == "no rule is about example.com:443"


@pytest.mark.parametrize(
    ("pattern", "host", "fits"),
    [
        ("example.com", "example.com", True),
        ("example.com", "www.example.com", False),
        ("*.example.com", "www.example.com", True),
        ("*.example.com", "a.b.c.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("EXAMPLE.com.", "example.com", True),
        ("*", "anything.test", True),
        ("bücher.example", "xn--bcher-kva.example", True),
    ],
)
def test_hosts(pattern, host, fits):
    assert (judge([rule(host=pattern)], host).action is Action.ALLOW) is fits


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "*.",
        "a*.com",
        "*.*.com",
        "https://a.com",
        "a.com:443",
        "a.com/x",
        "10.0.0.1",
        "a..b",
        "-a.b",
        "*.1",
        "::1",
        "x" * 64 + ".com",
    ],
)
def test_what_is_no_host(bad):
    with pytest.raises(ValueError, match=r"\w"):
        host_pattern(bad)


def test_an_upper_layer_beats_a_lower_one_and_deny_beats_ask_beats_allow_within_one():
    everything = [
        rule(f"{layer}-{action}", action, layer, "example.com")
        for layer in (Layer.PRESET, Layer.USER, Layer.VM, Layer.CORPORATE)
        for action in ("allow", "ask", "deny")
    ]
    left = list(everything)
    for layer in ("corporate", "vm", "user", "preset"):
        for action in ("deny", "ask", "allow"):
            verdict = judge(left)
            assert (verdict.rule, verdict.action) == (f"{layer}-{action}", action)
            left = [each for each in left if each.name != verdict.rule]
    assert judge(left).layer is Layer.DEFAULT


def test_ports_methods_and_paths_narrow_a_rule():
    narrow = rule(host="example.com", port=[443, 8443], method=["GET"], path=["/v1/*"])
    assert judge([narrow], method="GET", path="/v1/models").action is Action.ALLOW
    assert judge([narrow], method="POST", path="/v1/models").action is Action.DENY
    assert judge([narrow], method="GET", path="/v2/models").action is Action.DENY
    assert judge([narrow], port=80, method="GET", path="/v1/models").action is Action.DENY


def test_what_is_not_known_yet_may_go_on_only_if_it_may_be_allowed():
    reads = rule("reads", host="example.com", port=[443], method=["GET"])
    secret = rule("secret", "deny", host="example.com", path=["/secret/**"])
    policy = Policy((reads, secret))
    assert policy.judge_name("example.com").action is Action.ALLOW
    assert policy.judge(Subject(443, "example.com")).action is Action.ALLOW
    assert policy.judge(Subject(80, "example.com")).action is Action.DENY
    assert policy.judge(Subject(443, "example.com", method="GET", path="/secret/x")).rule == "secret"
    assert policy.judge_name("other.example").layer is Layer.DEFAULT
    closed = Policy((reads, rule("closed", "deny", host="example.com", layer=Layer.CORPORATE)))
    assert closed.judge_name("example.com").rule == "closed"


def test_a_name_is_looked_up_before_somebody_was_asked_only_if_something_there_needs_no_asking():
    asks = rule("asks", "ask", host="example.com", port=[443])
    assert Policy((asks,)).judge_name("example.com").action is Action.ASK
    assert judge([asks]).action is Action.ASK
    elsewhere = rule("elsewhere", host="example.com", port=[80])
    assert Policy((asks, elsewhere)).judge_name("example.com").action is Action.ALLOW
    closed = rule("closed", "deny", host="example.com", protocol="tcp")
    assert Policy((closed, elsewhere)).judge_name("example.com").action is Action.ALLOW
    assert Policy((rule("closed", "deny", host="example.com"), asks)).judge_name("example.com").rule == "closed"
    late = rule("late", "ask", Layer.VM, "example.com", method=["POST"])
    assert judge([late]).action is Action.ASK  # whatever it will be, it is not allowed without
    assert judge([late, elsewhere], port=80).action is Action.ALLOW


def test_an_answer_stands_above_what_asks_in_its_layer_and_below_what_denies():
    asks = rule("asks", "ask", host="*.com")
    assert judge([asks, rule("plain", host="example.com")]).rule == "asks"
    answer = rule("answer", host="example.com", port=[443], answers=True)
    assert judge([asks, answer]).rule == "answer"
    assert judge([asks, answer], port=80).rule == "asks"
    assert Policy((asks, answer)).judge_name("example.com").action is Action.ALLOW  # may be answered
    assert judge([asks, answer, rule("no", "deny", host="*")]).rule == "no"
    assert judge([rule("asks", "ask", Layer.CORPORATE, "*"), answer]).rule == "asks"


def test_what_may_not_be_passed_through_may_still_be_ended_here():
    against = rule("against", "deny", host="a.test", protocol="passthrough")
    through = rule("through", host="*", protocol="passthrough", layer=Layer.USER)
    assert Policy((against, rule("web", host="a.test"))).judge(Subject(443, "a.test")).rule == "web"
    verdict = Policy((against, through)).judge(Subject(443, "a.test"))
    assert (verdict.action, verdict.rule) == (Action.DENY, "against")
    assert Policy((against, through)).judge(Subject(443, "b.test")).protocol is Protocol.PASSTHROUGH


def test_a_name_that_one_protocol_may_not_use_is_looked_up_for_the_others():
    table = (rule("no-tcp", "deny", host="a.test", protocol="tcp"), rule("web", host="a.test"))
    assert Policy(table).judge_name("a.test").rule == "web"
    assert Policy(table[:1]).judge_name("a.test").action is Action.DENY


def test_raw_tcp_needs_a_rule_that_says_so_and_a_denial_is_about_every_protocol():
    web, raw = rule("web", host="db.test"), rule("raw", host="db.test", port=[5432], protocol="tcp")
    assert judge([web], "db.test", 5432, protocol=Protocol.TCP).action is Action.DENY
    assert judge([raw], "db.test", 5432, protocol=Protocol.TCP).protocol is Protocol.TCP
    assert judge([raw], "db.test", 5432).action is Action.DENY
    deny = rule("no", "deny", host="db.test")
    assert judge([raw, deny], "db.test", 5432, protocol=Protocol.TCP).rule == "no"


def test_pass_through_is_a_rule_s_alone_and_never_past_one_that_has_to_see_requests():
    pinned = rule("pinned", host="pinned.test", protocol="passthrough")
    assert judge([pinned], "pinned.test").protocol is Protocol.PASSTHROUGH
    assert judge([pinned], "pinned.test", method="GET", path="/").action is Action.DENY  # in the clear
    assert judge([pinned, rule(host="*.test")], "pinned.test").protocol is Protocol.PASSTHROUGH
    seen = rule("seen", "deny", Layer.CORPORATE, "*", method=["DELETE"])
    verdict = judge([pinned, seen], "pinned.test")
    assert (verdict.action, verdict.rule, verdict.layer) == (Action.DENY, "seen", Layer.CORPORATE)
    assert (
        judge([pinned, rule("looked-at", host="pinned.test", layer=Layer.CORPORATE)], "pinned.test").rule == "looked-at"
    )


def test_the_floor_is_above_every_rule_by_name():
    everything = [rule(host="*", layer=layer) for layer in (Layer.CORPORATE, Layer.VM, Layer.USER)]
    verdict = judge(everything, "inner.test", address="10.1.2.3")
    assert (verdict.action, verdict.layer, verdict.remedy) == (Action.DENY, Layer.FLOOR, None)
    assert verdict.reason == "inner.test leads to 10.1.2.3, which is a private address"
    assert judge(everything, "outer.test", address="93.184.216.34").action is Action.ALLOW


def test_what_was_judged_before_is_held_against_the_floor_again():
    own = []
    policy = Policy(
        (Rule("all", Action.ALLOW, Layer.USER, hosts=("*",)),),
        floor=lambda address: FloorHit("this host's own") if str(address) in own else None,
    )
    subject = Subject(443, "a.test", "203.0.113.1")
    assert policy.judge(subject).action is Action.ALLOW
    own.append("203.0.113.1")
    assert policy.judge(subject).layer is Layer.FLOOR
    own.clear()
    assert policy.judge(subject).action is Action.ALLOW


@pytest.mark.parametrize(
    ("layer", "passes"), [(Layer.CORPORATE, True), (Layer.VM, True), (Layer.USER, False), (Layer.PRESET, False)]
)
def test_only_a_range_of_the_corporate_or_the_vm_s_layer_leads_past_the_floor(layer, passes):
    lab = rule("lab", layer=layer, cidr=["192.168.7.0/24"], port=[5432], protocol="tcp")
    verdict = judge([lab], None, 5432, address="192.168.7.9", protocol=Protocol.TCP)
    assert (verdict.action is Action.ALLOW) is passes
    assert judge([lab], None, 5433, address="192.168.7.9", protocol=Protocol.TCP).layer is Layer.FLOOR
    assert judge([lab], None, 5432, address="192.168.8.9", protocol=Protocol.TCP).layer is Layer.FLOOR
    assert judge([lab], None, 5432, address="192.168.7.9").layer is Layer.FLOOR  # HTTP is not what it allows


def test_a_range_allows_no_name_that_nothing_else_allows():
    lab = rule("lab", layer=Layer.VM, cidr=["192.168.7.0/24"], port=[443])
    assert judge([lab], "lab.test").action is Action.DENY  # so it is not even resolved
    by_name = rule("by-name", host="lab.test")
    assert judge([lab, by_name], "lab.test", address="192.168.7.9").rule == "by-name"
    assert judge([by_name], "lab.test", address="192.168.7.9").layer is Layer.FLOOR


def test_a_rule_with_a_name_and_a_range_wants_both():
    lab = rule("lab", layer=Layer.VM, host="lab.test", cidr=["192.168.7.0/24"], port=[443])
    assert judge([lab], "lab.test").action is Action.ALLOW  # may be: to be resolved
    assert judge([lab], "lab.test", address="192.168.7.9").action is Action.ALLOW
    assert judge([lab], "lab.test", address="93.184.216.34").action is Action.DENY
    assert judge([lab], "other.test", address="192.168.7.9").layer is Layer.FLOOR
    assert judge([lab], None, address="192.168.7.9").layer is Layer.FLOOR


def test_a_denied_range_is_denied_to_every_name_that_leads_there():
    rules = [rule(host="*"), rule("no", "deny", Layer.CORPORATE, cidr=["93.184.216.0/24"])]
    assert judge(rules).action is Action.ALLOW
    assert judge(rules, address="93.184.216.34").rule == "no"


def test_networks_whose_gateway_gives_reserved_addresses():
    allowed = rule(host="*.test")
    gateway = (ResolveAllow(("*.test",), (network("10.0.0.0/8"), network("127.0.0.0/8"))),)
    assert judge([allowed], "a.test", address="10.9.9.9", resolve_allow=gateway).action is Action.ALLOW
    assert judge([allowed], "a.test", address="127.0.0.1", resolve_allow=gateway).layer is Layer.FLOOR
    assert judge([rule(host="*")], "a.example", address="10.9.9.9", resolve_allow=gateway).layer is Layer.FLOOR
    assert judge([rule(cidr=["10.0.0.0/8"])], None, address="10.9.9.9", resolve_allow=gateway).layer is Layer.FLOOR


def test_learning_lets_through_what_nobody_denies():
    denied = rule("no", "deny", host="denied.test")
    asked = rule("asks", "ask", host="asked.test")
    assert judge([denied, asked], learning=True).action is Action.ALLOW
    assert judge([denied, asked], "asked.test", learning=True).action is Action.ALLOW
    assert judge([denied, asked], "denied.test", learning=True).rule == "no"
    assert judge([], address="10.0.0.1", learning=True).layer is Layer.FLOOR
    assert judge([], "db.test", 5432, protocol=Protocol.TCP, learning=True).protocol is Protocol.TCP


def test_rules_end():
    policy = Policy(
        (rule("a", host="a.test", until=10.0), rule("b", host="b.test", until=20.0), rule("c", host="c.test"))
    )
    assert policy.ends() == 10.0
    later = policy.at(10.0)
    assert ([each.name for each in later.rules], later.version) == (["b", "c"], policy.version + 1)
    assert later.at(15.0) is later


def test_no_command_is_named_where_the_user_cannot_allow_it():
    assert judge([rule("no", "deny", Layer.CORPORATE, "example.com")]).remedy is None
    assert judge([rule("no", "deny", Layer.VM, "example.com")]).remedy is None
    assert judge([rule("no", "deny", Layer.USER, "example.com")]).remedy == "capsem net allow dev example.com"


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/", "/"),
        ("/a/b?x=/../y#z", "/a/b"),
        ("/a/./b/../c", "/a/c"),
        ("/a/..", "/"),
        ("/a/b/..", "/a/"),
        ("/%61%2e%2E/%7euser", "/a../~user"),
        ("/x/%2e%2e/y", "/y"),
        ("//a///b//", "/a/b/"),
        ("/a%2fb", "/a%2Fb"),
        ("/../../etc", "/etc"),
        ("*", "*"),
        ("/%zz", "/%zz"),
    ],
)
def test_normalised_paths(target, path):
    assert normalise(target) == path
    assert normalise(path) == path


def test_a_path_that_may_be_read_in_two_ways_is_denied_by_either_and_allowed_by_both():
    assert readings("/a/b") == ("/a/b",)
    assert readings("/public/..%2Fadmin/x") == ("/public/..%2Fadmin/x", "/admin/x")
    assert readings("/x/%252e%252e%252fadmin")[1] == "/admin"
    public = rule("public", host="example.com", path=["/public/**"])
    admin = rule("admin", "deny", host="example.com", path=["/admin/**"])
    assert judge([public], method="GET", path="/public/..%2Fadmin/x").action is Action.DENY
    assert judge([public, admin], method="GET", path="/public/..%2Fadmin/x").rule == "admin"
    assert judge([public], method="GET", path="/public/a%2Fb").action is Action.ALLOW
    assert judge([rule(host="example.com"), admin], method="GET", path="/" + "a" * 9000).rule == "admin"
    assert judge([public], method="GET", path="/public/" + "a" * 9000).action is Action.DENY


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("/", "/", True),
        ("/", "/a", False),
        ("/v1/*", "/v1/models", True),
        ("/v1/*", "/v1/", True),
        ("/v1/*", "/v1/a/b", False),
        ("/v1/**", "/v1/a/b", True),
        ("/v1/**", "/v1/", True),
        ("/v1/**", "/v1", False),
        ("/**", "/", True),
        ("/**/x", "/x", True),
        ("/**/x", "/a/b/x", True),
        ("/**/x/*", "/a/x/x/b", True),
        ("/a/**/b/**/c", "/a/b/b/x/c", True),
        ("/a/**/b/**/c", "/a/x/c", False),
        ("/*.js", "/a.js.js", True),
        ("/a*b*c", "/abxbc", True),
        ("/a*a", "/a", False),
        ("/**", "*", False),
    ],
)
def test_path_patterns(pattern, path, fits):
    assert PathPattern(pattern).matches(path) is fits


@pytest.mark.parametrize("bad", ["", "a", "/a?b", "/a**", "/a/../b", "/a//b", "/%61", "/a b/%2f"])
def test_patterns_that_nothing_could_match(bad):
    with pytest.raises(ValueError, match=r"\w"):
        PathPattern(bad)


def test_a_pattern_with_an_escaped_slash_is_about_that_and_nothing_more():
    scoped = rule(host="example.com", path=["/@scope%2Fname"])
    assert judge([scoped], method="GET", path="/@scope%2Fname").action is Action.ALLOW
    assert judge([scoped], method="GET", path="/@scope/name").action is Action.DENY
    assert judge([scoped], method="GET", path="/@scope%2Fother").action is Action.DENY
    odd = rule(host="example.com", path=["/a%2A%2Fb"])
    assert judge([odd], method="GET", path="/a%2Fx%2Fb").action is Action.DENY


def test_a_hostile_path_costs_no_more_than_its_length():
    pattern = PathPattern("/" + "/".join(["**", "*a*b*c*"] * 10) + "/x")
    assert not pattern.matches("/" + "/".join(["aabbcc"] * 1000))
