"""What is learnt of records, and that what is learnt lets the same pass."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from capsem.egress.compose import Layers, compose
from capsem.egress.document import Document, from_text
from capsem.egress.facts import Action, Layer, Protocol, Subject
from capsem.egress.floor import floor
from capsem.egress.learn import learn
from capsem.egress.lint import lint
from capsem.egress.toml import dump

FLOOR = floor(lambda _address: False)
ADDRESS = "93.184.216.34"


def row(domain="a.test", port=443, method="GET", path="/", address=ADDRESS, **more):
    tls = more.pop("tls", "intercepted" if method and port != 80 else "none")
    known = {"process_name": "curl", "rule_layer": "default", "matched_rule": "default", "decision": "allowed"}
    return {
        "domain": domain,
        "port": port,
        "method": method,
        "path": path,
        "address": address,
        "tls": tls,
        **known,
        **more,
    }


def file_of(rows, own=None, **options):
    learnt = learn(rows, own or Document(), **options)
    return dump(learnt.document, comments=learnt.comments)


def rules_of(rows, **options):
    return [rule.to_dict() for rule in learn(rows, **options).document.rules]


def subject_of(row):
    protocol = Protocol.TCP if row["method"] is None and row["tls"] == "none" else Protocol.HTTP
    path = row["path"] if row["method"] else None
    return Subject(row["port"], row["domain"], row["address"], protocol, row["method"], path)


def test_a_file_for_people():
    rows = [
        row(path="/v1/models", process_name="python3"),
        row(method="POST", path="/v1/chat", process_name="node"),
        row("db.test", 5432, None, None),
        row("pinned.test", method=None, path=None, tls="passthrough"),
        row(None, 22, None, None, address="203.0.114.9", process_name=None),
    ]
    assert (
        file_of(rows)
        == """\
[network]
preset = "off"

[[network.rule]]
# 1 connection
name = "203.0.114.9-22-tcp"
action = "allow"
port = [22]
cidr = ["203.0.114.9/32"]
protocol = "tcp"

[[network.rule]]
# 2 requests, first by python3
name = "a.test-443"
action = "allow"
host = ["a.test"]
port = [443]
method = ["GET", "POST"]

[[network.rule]]
# 1 connection, first by curl
name = "db.test-5432-tcp"
action = "allow"
host = ["db.test"]
port = [5432]
protocol = "tcp"

[[network.rule]]
# 1 connection, first by curl
name = "pinned.test-443-passthrough"
action = "allow"
host = ["pinned.test"]
port = [443]
protocol = "passthrough"
"""
    )


def test_siblings_become_one_from_four_on():
    three = [row(f"h{number}.cdn.test") for number in range(3)]
    assert [rule["host"] for rule in rules_of(three)] == [["h0.cdn.test"], ["h1.cdn.test"], ["h2.cdn.test"]]
    four = [*three, row("h3.cdn.test", method="HEAD"), row("cdn.test"), row("h4.cdn.test", 8443)]
    assert [(rule["host"], rule["port"], rule["method"]) for rule in rules_of(four)] == [
        (["*.cdn.test"], [443], ["GET", "HEAD"]),
        (["cdn.test"], [443], ["GET"]),
        (["h4.cdn.test"], [8443], ["GET"]),
    ]
    assert "# names: h0.cdn.test, h1.cdn.test, h2.cdn.test, h3.cdn.test" in file_of(four)


def test_no_wildcard_over_domains_of_strangers():
    for domain in ("test", "co.uk", "com.au"):
        assert len(rules_of([row(f"h{number}.{domain}") for number in range(9)])) == 9


def test_paths_only_on_request_and_as_directories_when_there_are_many():
    few = [row(path="/v1/models"), row(path="/v1/a*b")]
    assert "path" not in rules_of(few)[0]
    assert rules_of(few, paths=True)[0]["path"] == ["/v1/**", "/v1/models"]
    many = [row(path=f"/api/v1/things/{number}/parts/{part}") for number in range(30) for part in range(2)]
    assert rules_of(many, paths=True)[0]["path"] == ["/api/v1/things/**"]
    flat = [row(path=f"/{number}") for number in range(30)]
    assert rules_of(flat, paths=True)[0]["path"] == ["/**"]
    assert "path" not in rules_of([row(path="/" + "a" * 4095)], paths=True)[0]  # may have been cut


def test_what_is_not_learnt_and_why():
    learnt = learn(
        [
            row("inner.test", address="10.0.0.1", rule_layer="floor"),
            row("inner.test", address="10.0.0.1", rule_layer="floor"),
            row("pinned.test", method=None, path=None, tls="intercepted"),
            row(port=0),
            row("not a name"),
            row(None, address=None),
            row(method="get it"),
        ]
    )
    assert learnt.document.rules == ()
    assert learnt.rows == 0
    assert learnt.left_out[0] == "inner.test:443 is below the floor (2 times)"
    assert len(learnt.left_out) == 6
    assert any("needs passthrough" in each for each in learnt.left_out)


def test_what_leads_past_the_floor_is_kept_where_it_was_used_and_so_is_what_a_rule_says_beside():
    own = from_text(
        "[network]\nextra_ca = ['/lab.pem']\npreset = 'medium'\notherwise = 'ask'\n"
        "[[network.rule]]\nname = 'lab'\naction = 'allow'\ncidr = '192.168.7.0/24'\nport = [443, 22]\n"
        "[[network.rule]]\nname = 'unused'\naction = 'allow'\ncidr = '192.168.8.0/24'\nport = 443\n"
        "[[network.rule]]\nname = 'grpc'\naction = 'allow'\nhost = '*.lab.test'\nhttp2 = true\nmodel = 'openai'\n",
        Layer.VM,
        "own",
    )
    rows = [
        row("x.lab.test", address="192.168.7.9", rule_layer="vm", matched_rule="grpc"),
        row(None, 443, address="192.168.7.10", rule_layer="vm", matched_rule="lab"),
    ]
    learnt = learn(rows, own)
    lab, host = learnt.document.rules
    assert (lab.name, host.hosts, host.http2, host.model) == ("lab", ("x.lab.test",), True, "openai")
    assert (learnt.document.extra_ca, learnt.document.preset, learnt.document.otherwise) == (("/lab.pem",), "off", None)
    policy, _ = compose(Layers(), learnt.document, floor=FLOOR, vm="new")
    assert all(policy.judge(subject_of(each)).action is Action.ALLOW for each in rows)


def test_a_guest_writes_no_lines_of_the_file():
    text = file_of([row(process_name="x\n[[network.rule]]\naction = 'allow'\nhost = '*'\n\x1b")])
    assert [rule.hosts for rule in from_text(text, Layer.VM, "f").rules] == [("a.test",)]
    assert "\x1b" not in text


hosts = st.sampled_from(
    ["a.test", "h1.cdn.test", "h2.cdn.test", "h3.cdn.test", "h4.cdn.test", "x.y.cdn.test", "b.co.uk"]
)
paths = st.text("ab/*%2e ;é", max_size=12).map(lambda text: "/" + text)


@st.composite
def rows(draw):
    kind = draw(st.sampled_from(["http", "tcp", "number"]))
    port = draw(st.sampled_from([80, 443, 8443]))
    if kind == "http":
        return row(draw(hosts), port, draw(st.sampled_from(["GET", "POST", "M-SEARCH"])), draw(paths))
    return row(
        draw(hosts) if kind == "tcp" else None,
        port,
        None,
        None,
        draw(st.sampled_from([ADDRESS, "2606:2800::1"])),
        tls="none",
    )


@given(st.lists(rows(), max_size=20), st.booleans())
def test_what_was_learnt_lets_the_same_pass_and_is_no_bad_policy(recorded, with_paths):
    from capsem.egress.paths import normalise

    text = file_of(recorded, paths=with_paths)
    document = from_text(text, Layer.VM, "learnt.toml")
    assert lint(document.rules, FLOOR) == []
    assert dump(document) == "\n".join(line for line in text.splitlines() if not line.startswith("#")) + "\n"
    policy, _ = compose(Layers(), document, floor=FLOOR, vm="new")
    for each in recorded:
        subject = subject_of({**each, "path": each["path"] and normalise(each["path"])})
        assert policy.judge(subject).action is Action.ALLOW, (subject, text)
        if subject.host:
            assert policy.judge_name(subject.host).action is Action.ALLOW
    for foreign in ("evil.test", "cdn.test.evil.test", "xcdn.test"):
        assert policy.judge(Subject(443, foreign, ADDRESS, method="GET", path="/")).action is Action.DENY
