"""What may stand in a policy, once: the keys, what they hold, and what is told of them.

Files are read by it, JSON that travels between processes is, and the reference in the docs is printed from it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PRESETS: Final = {
    "off": "nothing but what rules allow",
    "high": "reading (GET, HEAD) from the package registries that this host's own pip, npm, apt, cargo and go are set to",
    "medium": "what high allows, and every host that was allowed with `capsem net allow --always`",
    "open-with-floor": "every name and every address above the floor, any protocol",
}
DEFAULT_PRESET: Final = "medium"
MODELS: Final = ("anthropic", "openai", "gemini")


class Key(NamedTuple):
    """One key: `kind` is how its value is read (see `document`), `says` a sentence for the reference."""

    name: str
    kind: str
    says: str
    example: str = ""


NETWORK_KEYS: Final = (
    Key("preset", "preset", "what is allowed beneath the rules: " + ", ".join(PRESETS), '"medium"'),
    Key("otherwise", "otherwise", 'what becomes of what no rule is about: "deny" (unless said), or "ask"', '"ask"'),
    Key("rule", "rules", "the rules, each a table [[network.rule]] of its own"),
    Key(
        "resolve_allow",
        "resolve_allow",
        "for networks whose gateway gives names reserved addresses: tables [[network.resolve_allow]] with host and cidr; names "
        "may lead there, this host and metadata services excepted",
    ),
    Key(
        "client_certificate",
        "certificates",
        "tables [network.client_certificate.NAME] with cert and key, PEM files of this host",
    ),
    Key(
        "extra_ca",
        "files",
        "PEM files with more authorities that sign for servers, beside this host's own",
        '["/etc/ca.pem"]',
    ),
    Key(
        "upstream_proxy",
        "proxy",
        'the proxy through which this host reaches the rest: a URL, "none", or, unless said, what the environment of the '
        "service says (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY)",
        '"http://proxy.example:3128"',
    ),
)

RULE_KEYS: Final = (
    Key(
        "name",
        "name",
        "shown as matched_rule in records; letters, digits, - _ . up to 64; rule-N unless said",
        '"model-api"',
    ),
    Key("action", "action", '"allow", "deny" or "ask"', '"allow"'),
    Key(
        "host",
        "hosts",
        "names: exact, or *. and a domain for all below it at any depth, never the domain itself, or * for every name",
        '["api.example.com", "*.example.org"]',
    ),
    Key("port", "ports", "ports; all unless said; a rule with cidr that allows or asks has to say", "[443]"),
    Key("method", "methods", "methods of HTTP; all unless said", '["GET", "HEAD"]'),
    Key(
        "path",
        "paths",
        "normalised paths without query: * for anything within a segment, ** for any number of segments",
        '["/v1/*", "/static/**"]',
    ),
    Key(
        "cidr",
        "cidrs",
        "address ranges. Without host: what is asked for by number. With host: both have to fit. Of the corporate file or the "
        "VM's policy it is the only way past the floor",
        '["192.168.7.0/24"]',
    ),
    Key(
        "protocol",
        "protocol",
        '"http" (unless said, and of a denial: all), "tcp" for anything that is neither HTTP nor TLS, "passthrough" for TLS '
        "that is not looked into: the name in its first message is all that is judged",
        '"tcp"',
    ),
    Key("http2", "flag", "offer HTTP/2, too (gRPC needs it)", "true"),
    Key("client_certificate", "certificate", "the name of a client certificate to show to the server", '"work"'),
    Key(
        "ech",
        "flag",
        "with passthrough: also a first message that says it holds another, encrypted name; then nobody knows which host it is",
        "true",
    ),
    Key(
        "model",
        "model",
        "the API of models that is spoken there: "
        + ", ".join(MODELS)
        + "; calls are then recorded with tokens and cost. Hosts of the providers themselves need no word",
        '"openai"',
    ),
    Key(
        "answers",
        "flag",
        "of a rule that allows: it does so although a rule of the same layer asks, as `capsem net allow` answers such a rule",
        "true",
    ),
    Key("until", "time", "when the rule ends, a time with its offset", "2027-01-31T12:00:00Z"),
)

RESOLVE_KEYS: Final = (
    Key("host", "hosts", "names, as in a rule; * unless said"),
    Key("cidr", "cidrs", "where they may lead"),
)
RESERVED: Final = {"when": "conditions are not there yet; write a rule for each case"}
