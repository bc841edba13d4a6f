"""The index judges as a plain search would, and the order of layers and actions holds whatever rules there are."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st

from capsem.egress.facts import Action, Layer, Protocol, Subject
from capsem.egress.paths import PathPattern, normalise, readings
from capsem.egress.policy import Policy
from capsem.egress.rules import LAYERS, Match, Rule, host_matches, network

HOSTS = ("a.test", "b.a.test", "c.b.a.test", "b.test", "x.example")
PATTERNS = (*HOSTS, "*.a.test", "*.test", "*.b.a.test", "*.example", "*")
NETWORKS = ("203.0.113.0/24", "203.0.113.7/32", "198.51.100.0/25", "0.0.0.0/0", "2001:db8::/32", "::/0")
ADDRESSES = ("203.0.113.7", "203.0.113.8", "198.51.100.200", "2001:db8::1")
PATHS = ("/", "/a", "/a/b", "/a/b/c", "/x%2Fa")
PATH_PATTERNS = ("/", "/*", "/**", "/a/**", "/a/*", "/**/b", "/x/a")


def some(values, most=3):
    return st.lists(st.sampled_from(values), max_size=most, unique=True).map(tuple)


@st.composite
def rules(draw):
    action = draw(st.sampled_from(list(Action)))
    hosts = draw(some(PATTERNS))
    cidrs = draw(some(NETWORKS)) if hosts else draw(some(NETWORKS).filter(bool))
    protocol = draw(st.sampled_from([*Protocol, *([None] if action is Action.DENY else [])]))
    requests = protocol in {None, Protocol.HTTP}
    return Rule(
        draw(st.text("abc", min_size=1, max_size=3)),
        action,
        draw(st.sampled_from(LAYERS)),
        hosts,
        draw(some((80, 443, 5432))),
        draw(some(("GET", "POST"))) if requests else (),
        tuple(PathPattern(each) for each in draw(some(PATH_PATTERNS))) if requests else (),
        tuple(network(each) for each in cidrs),
        protocol,
        answers=action is Action.ALLOW and draw(st.booleans()),
    )


@st.composite
def subjects(draw):
    host = draw(st.sampled_from([*HOSTS, None]))
    address = draw(st.sampled_from([*ADDRESSES, *([None] if host else [])]))
    protocol = draw(st.sampled_from([Protocol.HTTP, Protocol.TCP]))
    request = protocol is Protocol.HTTP and draw(st.booleans())
    return Subject(
        draw(st.sampled_from((80, 443, 5432))),
        host,
        address,
        protocol,
        draw(st.sampled_from(("GET", "POST"))) if request else None,
        draw(st.sampled_from(PATHS)) if request else None,
    )


def plain_fit(rule, subject):
    """The table of the policy reference, read aloud; the subject is complete."""
    address = ip_address(subject.address)
    in_range = any(address in each for each in rule.cidrs)
    if rule.hosts and not (subject.host and any(host_matches(each, subject.host) for each in rule.hosts)):
        return False
    if not rule.hosts and subject.host and rule.action is not Action.DENY:
        return False
    if rule.cidrs and not in_range:
        return False
    if rule.ports and subject.port not in rule.ports:
        return False
    if rule.protocol is Protocol.PASSTHROUGH and (subject.protocol is Protocol.TCP or subject.method):
        return False
    if rule.protocol in {Protocol.TCP, Protocol.HTTP} and rule.protocol is not subject.protocol:
        return False
    if (rule.methods or rule.paths) and subject.protocol is Protocol.TCP:
        return False
    if rule.methods and subject.method not in rule.methods:
        return False
    if rule.paths:
        fits = [
            any(pattern.matches(each, second=at > 0) for pattern in rule.paths)
            for at, each in enumerate(readings(subject.path))
        ]
        return all(fits) if rule.action is Action.ALLOW else any(fits)
    return True


def complete(subject):
    """As it is known when it is dialled for one request, or for raw bytes."""
    return Subject(
        subject.port,
        subject.host,
        subject.address or ADDRESSES[0],
        subject.protocol,
        subject.method or ("GET" if subject.protocol is Protocol.HTTP else None),
        subject.path or ("/" if subject.protocol is Protocol.HTTP else None),
    )


@given(st.lists(rules(), max_size=12), subjects())
@settings(max_examples=300)
def test_the_index_finds_what_a_plain_search_finds(table, subject):
    whole = complete(subject)
    fitting = [rule for rule in table if plain_fit(rule, whole)]
    verdict = Policy(tuple(table)).judge(whole)
    if not fitting:
        assert (verdict.action, verdict.layer) == (Action.DENY, Layer.DEFAULT)
        return
    layer = min((rule.layer for rule in fitting), key=LAYERS.index)
    if any(rule.answers for rule in fitting if rule.layer is layer) and not any(
        rule.action is Action.DENY for rule in fitting if rule.layer is layer
    ):
        assert (verdict.layer, verdict.action) == (layer, Action.ALLOW)
        return
    strongest = min(
        (rule.action for rule in fitting if rule.layer is layer), key=[Action.DENY, Action.ASK, Action.ALLOW].index
    )
    assert (verdict.layer, verdict.action) == (layer, strongest)
    assert verdict.rule in {rule.name for rule in fitting if rule.layer is layer and rule.action is strongest}


@given(st.lists(rules(), max_size=8), subjects(), st.randoms(use_true_random=False))
def test_the_order_of_writing_decides_nothing(table, subject, random):
    shuffled = list(table)
    random.shuffle(shuffled)
    one, other = Policy(tuple(table)).judge(subject), Policy(tuple(shuffled)).judge(subject)
    assert (one.action, one.layer, one.protocol) == (other.action, other.layer, other.protocol)


@given(st.lists(rules(), max_size=8), subjects(), st.sampled_from(LAYERS))
def test_one_more_denial_never_opens_anything(table, subject, layer):
    denial = Rule("no", Action.DENY, layer, ("*",), cidrs=(), protocol=None)
    before, after = Policy(tuple(table)), Policy((*table, denial))
    if before.judge(subject).action is Action.DENY:
        assert after.judge(subject).action is Action.DENY
    if layer is LAYERS[0] and subject.host is not None:
        assert after.judge(subject).rule == "no" or after.judge(subject).action is Action.DENY


@given(st.lists(rules(), max_size=8), subjects())
@settings(max_examples=300)
def test_what_is_allowed_in_the_end_was_let_through_on_its_way(table, subject):
    """And what is refused early would have been refused in the end."""
    policy = Policy(tuple(table))
    end = policy.judge(complete(subject))
    if end.action is Action.DENY or subject.host is None:
        return
    early = [
        policy.judge_name(subject.host),
        policy.judge(Subject(subject.port, subject.host, protocol=subject.protocol)),
    ]
    seen = [each for each in early if each.action is Action.DENY]
    # A rule of pass-through that may not be used is the one thing that an early look refuses: it has no request to judge.
    assert all(verdict.reason.startswith("rule ") and "through" in verdict.reason for verdict in seen), (
        table,
        early,
        end,
    )


@given(st.text("ab./%2eEfF5cC;\\", max_size=30))
def test_a_normalised_path_stays_as_it_is(text):
    path = normalise("/" + text)
    assert normalise(path) == path
    assert path.startswith("/")
    assert "/../" not in path + "/"
    assert "//" not in path
    for reading in readings(path):
        assert "/../" not in reading + "/"


@given(
    st.lists(st.sampled_from(["a", "b", "*", "**", "a*", "*b*"]), min_size=1, max_size=6),
    st.lists(st.sampled_from(["a", "b", "ab", ""]), min_size=1, max_size=7),
)
def test_patterns_fit_as_a_plain_recursion_says(wanted, given_segments):
    def plain(pattern, segments):
        if not pattern:
            return not segments
        if pattern[0] == "**":
            if len(pattern) == 1:
                return bool(segments)
            return any(plain(pattern[1:], segments[cut:]) for cut in range(len(segments) + 1))
        return bool(segments) and one(pattern[0], segments[0]) and plain(pattern[1:], segments[1:])

    def one(pattern, text):
        if not pattern:
            return not text
        if pattern[0] == "*":
            return any(one(pattern[1:], text[cut:]) for cut in range(len(text) + 1))
        return bool(text) and text[0] == pattern[0] and one(pattern[1:], text[1:])

    pattern = PathPattern("/" + "/".join(wanted))
    assert pattern.matches("/" + "/".join(given_segments)) == plain(wanted, given_segments)


def test_matches_compare():
    assert Match.NO < Match.MAYBE < Match.YES
