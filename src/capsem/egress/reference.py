"""docs/policy.md, made from the schema: `python -m capsem.egress.reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from capsem.egress.schema import NETWORK_KEYS, PRESETS, RESERVED, RESOLVE_KEYS, RULE_KEYS, Key

HEAD = """# Policy: what a VM may reach

Generated from the schema by `make docs`; do not edit. [What a VM may reach](network.md) is the guide to it.

A policy is a TOML file. What counts is its table `[network]`; a file that has a mistake counts for nothing, and `capsem net lint`
tells all of them. The same keys stand in the user's file (`$CAPSEM_HOME/config.toml`), in the company's
(`$CAPSEM_CORP_CONFIG`, or `$CAPSEM_HOME/corp.toml`), and in the policy of a VM (`capsem create --net FILE`, `capsem net set`).

## What decides

1. **The floor** denies addresses that are not the open internet: this computer's, private, link-local and reserved ones, metadata
   services, and whatever only wraps one of those. A rule with `cidr` of the company's file or of a VM's own policy leads past it;
   `resolve_allow` lets names lead to private and reserved ones, for networks whose gateway answers so.
2. **Layers**, from strong to weak: corporate, vm, user, preset. The first that has a rule about a request decides.
3. **Within one layer** deny beats ask beats allow, in whatever order they are written. An allowing rule that `answers` stands
   above those that ask.
4. What no rule is about is denied, or asked about where `otherwise` says so.

A name is judged before it is looked up, a connection before it is made, each address before it is dialled, each request before it
is sent.
"""


def to_markdown() -> str:
    """The page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield HEAD
    yield "## Presets\n\n| preset | what it allows |\n|---|---|"
    yield from (f"| `{name}` | {says} |" for name, says in PRESETS.items())
    for title, keys in (
        ("[network]", NETWORK_KEYS),
        ("[[network.rule]]", RULE_KEYS),
        ("[[network.resolve_allow]]", RESOLVE_KEYS),
    ):
        yield f"\n## `{title}`\n"
        yield from _table(keys)
    yield (
        "\nA list of one may be written without its brackets. Reserved, and refused for now: "
        + "; ".join(f"`{name}` ({says})" for name, says in RESERVED.items())
        + "."
    )


def _table(keys: Sequence[Key]) -> Iterator[str]:
    yield "| key | meaning | example |\n|---|---|---|"
    for key in keys:
        example = f"`{key.example}`" if key.example else ""
        yield f"| `{key.name}` | {key.says.replace('|', chr(92) + '|')} | {example} |"


if __name__ == "__main__":
    sys.stdout.write(to_markdown())
