from __future__ import annotations

from ipaddress import ip_address

import pytest

from capsem.egress.document import Document, check_text, from_dict, from_text
from capsem.egress.facts import Action, Layer, Protocol
from capsem.egress.lint import lint
from capsem.egress.policy import FloorHit
from capsem.egress.schema import NETWORK_KEYS, RULE_KEYS
from capsem.model.errors import InvalidInput

WHOLE = """
[vm.resources]
ram_gb = 2

[network]
preset = "high"
otherwise = "ask"
extra_ca = ["/etc/ca.pem"]
upstream_proxy = "http://proxy.test:3128"

[[network.resolve_allow]]
host = ["*.corp.test"]
cidr = ["203.0.113.0/24"]

[network.client_certificate.work]
cert = "/etc/work.pem"
key = "~/work.key"

[[network.rule]]
name = "model-api"
action = "allow"
host = ["api.example.com", "*.Example.ORG"]
port = 443
method = ["GET", "POST"]
path = ["/v1/*"]
http2 = true
client_certificate = "work"
model = "openai"

[[network.rule]]
action = "allow"
cidr = ["192.168.7.0/24"]
port = [5432]
protocol = "tcp"
until = 2027-01-31T12:00:00Z
answers = true

[[network.rule]]
name = "pinned"
action = "allow"
host = "pinned.test"
protocol = "passthrough"
ech = true

[[network.rule]]
name = "never"
action = "deny"
host = "evil.test"
"""


def document(rules, layer=Layer.VM):
    return from_text("\n".join(f"[[network.rule]]\n{rule}" for rule in rules), layer, "policy.toml")


def problems(text, layer=Layer.VM):
    return [problem.at("policy.toml") for problem in check_text(text, layer, "policy.toml")[1]]


def test_everything_that_may_be_said_is_read_and_goes_through_json():
    found = from_text(WHOLE, Layer.VM, "policy.toml")
    assert (found.preset, found.otherwise, found.extra_ca) == ("high", Action.ASK, ("/etc/ca.pem",))
    assert found.certificates["work"].key == "~/work.key"
    api, lab, pinned, never = found.rules
    assert pinned.ech
    assert api.hosts == ("api.example.com", "*.example.org")
    assert (api.ports, api.methods, api.http2, api.certificate) == ((443,), ("GET", "POST"), True, "work")
    assert api.model == "openai"
    assert (lab.name, lab.protocol, lab.until) == ("rule-2", Protocol.TCP, 1801396800.0)
    assert (never.protocol, never.where) == (None, "policy.toml, line 45")
    table = found.to_dict()
    assert set(table) == {key.name for key in NETWORK_KEYS}
    assert {key for rule in table["rule"] for key in rule} == {key.name for key in RULE_KEYS}
    assert from_dict(table, Layer.VM, "record") == found


def test_a_file_that_says_nothing_of_networks_says_nothing():
    assert from_text("[vm]\nledger = 'on'\n", Layer.USER, "config.toml") == Document()
    assert Document().to_dict() == {}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('action = "alow"', "'alow' is none of allow, deny, ask"),
        ("action = true", "True is none of"),
        ('hosts = ["a.test"]', "there is no key hosts; there are: name, action, host"),
        ('when = "x"', "conditions are not there yet"),
        ('host = ["https://a.test"]', "a name alone, without scheme, port or path"),
        ('host = ["10.0.0.1"]', "a rule names those with cidr"),
        ('host = ["a.*.test"]', "the only patterns are"),
        ("host = []", "an empty list"),
        ("host = [1]", "1 is no text"),
        ("port = [70000]", "70000 is no port"),
        ("port = [true]", "True is no port"),
        ('port = "443"', "'443' is no port"),
        ('method = ["get"]', "those are in capitals"),
        ('path = ["v1"]', "a path begins with /"),
        ('path = ["/a/../b"]', "write /b"),
        ('path = ["/é"]', "/%C3%A9"),
        ('cidr = ["10.0.0.1/8"]', "has host bits set"),
        ('cidr = ["::ffff:10.0.0.0/104"]', "write the IPv4 range itself"),
        ('protocol = "udp"', "'udp' is none of http, tcp, passthrough"),
        ('name = "a b"', "is no name"),
        ('http2 = "yes"', "neither true nor false"),
        ("until = 2027-01-31", "is no time with its offset"),
        ("until = 2027-01-31T12:00:00", "is no time with its offset"),
        ("until = nan", "is no time"),
        ('"a\\nb" = 1', "there is no key a"),
    ],
)
def test_what_is_wrong_with_a_rule_is_told_with_its_line(line, told):
    good = '[[network.rule]]\nname = "good"\naction = "allow"\nhost = "a.test"\n'
    text = f"[network]\n# a comment\n{good}[[network.rule]]\n\n{line}\n"
    (found,) = [each for each in problems(text) if "says no action" not in each and "names neither" not in each]
    assert told in found
    assert found.startswith(("policy.toml, line 9: rule rule-2: ", "policy.toml, line 7: rule rule-2: "))
    assert check_text(text, Layer.VM, "policy.toml")[0] is None


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('action = "allow"', "names neither host nor cidr"),
        ('host = "a.test"', "says no action"),
        ('action = "allow"\ncidr = "10.0.0.0/8"', "it has to name ports"),
        ('action = "allow"\nhost = "a.test"\nprotocol = "tcp"\npath = "/"', "path means nothing"),
        ('action = "allow"\nhost = "a.test"\nprotocol = "passthrough"\nmethod = "GET"', "method means nothing"),
        ('action = "ask"\ncidr = "10.0.0.0/8"\nport = 1\nprotocol = "passthrough"', "it needs host"),
        ('action = "deny"\nhost = "a.test"\nhttp2 = true', "needs no http2"),
        ('action = "ask"\nhost = "a.test"\nanswers = true', "only what allows can answer"),
        ('action = "allow"\nhost = "a.test"\nech = true', "only where something is passed through"),
    ],
)
def test_contradictions(lines, told):
    (found,) = problems(f"[[network.rule]]\n{lines}\n")
    assert told in found


def test_a_denied_range_needs_no_ports():
    assert problems('[[network.rule]]\naction = "deny"\ncidr = "203.0.113.0/24"\n') == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("network = 1", "network is a table"),
        (
            "[network]\npreset = 'low'",
            "policy.toml, line 2: preset: 'low' is none of off, high, medium, open-with-floor",
        ),
        ("[network]\nrule = 1", "write [[network.rule]], once for each"),
        ("[network]\nrule = [1]", "write [[network.rule]]"),
        ("[network]\nallow = ['a.test']", "there is no key allow"),
        ("[network]\nupstream_proxy = 'proxy'", "is no proxy"),
        ("[network]\nupstream_proxy = 'http://a:b'", "is no proxy"),
        ("[network]\nextra_ca = ['ca.pem']", "no absolute path"),
        ("[network.client_certificate]\nwork = 1", "work needs cert and key"),
        ("[[network.resolve_allow]]\nhost = '*'", "says no cidr"),
        ("[network\n", "this is no TOML"),
        ("a = " + "[" * 5000, "this is no TOML"),
        ("#" * 300000, "too many for a policy"),
        (
            "[[network.rule]]\naction='deny'\nhost='a.test'\nname='x'\n" * 2,
            "policy.toml, line 8: rule x: another rule has this name",
        ),
    ],
)
def test_what_is_wrong_with_a_file(text, told):
    assert any(told in each for each in problems(text)), problems(text)


def test_everything_wrong_is_told_at_once_but_not_without_end():
    with pytest.raises(InvalidInput) as caught:
        from_text("[[network.rule]]\nport = 0\n" * 20, Layer.USER, "config.toml")
    assert "config.toml, line 2: rule rule-1: port: 0 is no port" in caught.value.message
    assert "config.toml, line 20: rule rule-10: " in caught.value.message
    assert caught.value.message.endswith("and 10 more")


# -- lint


def floor(address):
    return FloorHit("private") if address.is_private else None


def told(rules, layer=Layer.VM):
    return [problem.at("policy.toml") for problem in lint(document(rules, layer).rules, floor)]


WIDE, NARROW = "name = 'wide'\n", "name = 'narrow'\n"


@pytest.mark.parametrize(
    "rules",
    [
        [WIDE + "action = 'deny'\nhost = '*.a.test'", NARROW + "action = 'allow'\nhost = 'www.a.test'"],
        [NARROW + "action = 'allow'\nhost = 'www.a.test'", WIDE + "action = 'deny'\nhost = '*'"],
        [
            WIDE + "action = 'allow'\nhost = 'a.test'",
            NARROW + "action = 'allow'\nhost = 'a.test'\nport = 443",
        ],
        [
            WIDE + "action = 'ask'\nhost = '*'\nport = [80, 443]",
            NARROW + "action = 'allow'\nhost = '*.b.test'\nport = 80\npath = '/x'",
        ],
        [
            WIDE + "action = 'deny'\ncidr = '203.0.113.0/24'",
            NARROW + "action = 'allow'\ncidr = '203.0.113.7/32'\nport = 80",
        ],
        [
            WIDE + "action = 'deny'\ncidr = '203.0.113.0/24'",
            NARROW + "action = 'allow'\nhost = 'a.test'\ncidr = '203.0.113.7/32'\nport = 80",
        ],
    ],
)
def test_a_rule_that_another_one_hides(rules):
    (found,) = told(rules)
    assert "rule narrow: it can never decide: rule wide " in found
    assert found.startswith("policy.toml, line ")


@pytest.mark.parametrize(
    "rules",
    [
        ["action = 'allow'\nhost = '*.a.test'", "action = 'deny'\nhost = 'www.a.test'"],
        ["action = 'deny'\nhost = '*.a.test'", "action = 'allow'\nhost = 'a.test'"],
        ["action = 'deny'\nhost = 'a.test'\nport = 80", "action = 'allow'\nhost = 'a.test'"],
        ["action = 'deny'\nhost = 'a.test'\nprotocol = 'http'", "action = 'allow'\nhost = 'a.test'\nprotocol = 'tcp'"],
        [
            "action = 'deny'\nhost = 'a.test'\nmethod = 'PUT'",
            "action = 'allow'\nhost = 'a.test'\nmethod = ['GET', 'PUT']",
        ],
        ["action = 'deny'\nhost = 'a.test'\nuntil = 1", "action = 'allow'\nhost = 'a.test'"],
        ["action = 'allow'\nhost = '*'", "action = 'allow'\nhost = 'a.test'\ncidr = '10.0.0.0/8'\nport = 80"],
        [
            "action = 'allow'\ncidr = '10.0.0.0/8'\nport = 80",
            "action = 'allow'\nhost = 'a.test'\ncidr = '10.1.0.0/16'\nport = 80",
        ],
    ],
)
def test_a_rule_that_still_decides_something(rules):
    assert told(rules) == []


def test_a_range_below_the_floor_where_none_leads_past_it():
    lab = "action = 'allow'\ncidr = '192.168.7.0/24'\nport = 22"
    assert told([lab]) == []
    (found,) = told([lab], Layer.USER)
    assert "below the floor" in found
    assert floor(ip_address("192.168.7.0")) is not None
