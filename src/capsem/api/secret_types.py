"""What travels between clients and the service about secrets: how they are defined. Values go in, and never come out."""

from __future__ import annotations

from typing import Annotated

import msgspec

from capsem.api.types import Body

LONGEST_VALUE = 16 * 1024  # characters

_Hosts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=100)]


class SecretInfo(Body, frozen=True):
    """A secret that may be lent.

    `source` says where its value comes from (of a command the program alone), `where` which file defines it, `hosts` where it may
    go. `header`: it may stand in any header, or in these; `basic`, `query`, `body`: inside of Basic, in the query, in the body.
    `env` is the variable that holds its placeholder in VMs, `vms` are those that it is lent to.
    """

    name: str
    source: str
    hosts: list[str]
    where: str
    header: bool | list[str]
    basic: bool
    query: bool
    body: bool
    prefix: str
    ttl: float
    vms: list[str]
    env: str | None = None
    stored_in: str | None = None


class SecretsResponse(Body, frozen=True):
    """Every secret, by name."""

    secrets: list[SecretInfo]


class SetSecretRequest(Body, frozen=True):
    """Define a secret, or define it anew: either its `source`, or a `value` for Capsem to keep, in the keyring of this desktop
    or a file of its own. What is left out is as usual (docs/secrets.md)."""

    hosts: _Hosts
    source: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    value: Annotated[str, msgspec.Meta(max_length=LONGEST_VALUE)] | None = None
    header: bool | list[str] = True
    basic: bool = True
    query: bool = False
    body: bool = False
    env: str | None = None
    prefix: str | None = None
    ttl: float = 60


class SecretTestResponse(Body, frozen=True):
    """Whether the value can be had: how long it is, in characters, or what was in the way."""

    ok: bool
    length: int | None = None
    took_ms: float | None = None
    problem: str | None = None
