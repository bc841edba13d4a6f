"""What a guest's questions are answered: policy first, then the host's resolver, then the floor."""

from __future__ import annotations

import asyncio
import socket
import struct
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from capsem.egress import lookups
from capsem.egress.dns import Code, Kind
from capsem.egress.facts import Action
from capsem.egress.names import is_synthetic
from egress_bench import Bench, bench, rule, run, sites


async def ask(world: Bench, name: str, kind: int = Kind.A) -> tuple[int, list[str]]:
    """Code and addresses."""
    labels = b"".join(bytes([len(each)]) + each.encode() for each in name.split("."))
    reply = await world.egress.resolve(
        struct.pack("!6H", 9, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)
    )
    number, flags, _, answers, _, _ = struct.unpack_from("!6H", reply)
    assert number == 9
    found = [str(IPv4Address(reply[len(reply) - 16 * each - 4 :][:4])) for each in range(answers)]
    return flags & 0xF, found[::-1]


@run
async def test_an_allowed_name_gets_its_addresses(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("site", hosts=("site.test",))) as world:
        world.names["site.test"] = ["203.0.113.5", "93.184.215.14", "2606:4700::1"]
        world.policy = world.policy
        code, found = await ask(world, "Site.Test")
        assert (code, found) == (0, ["93.184.215.14"]), "what is below the floor is of no use to a guest"
        assert world.names_table.names("93.184.215.14") == ("site.test",)
        row = world.rows.questions[0]
        assert (row.domain, row.record_type, row.decision, row.answer) == ("site.test", "A", "allowed", "93.184.215.14")
        assert (row.matched_rule, row.rule_layer) == ("site", "user")


@run
async def test_a_name_that_leads_nowhere_good_leads_to_the_page(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("site", hosts=("*.test",))) as world:
        world.names |= {"inside.test": ["10.0.0.1"], "six.test": ["2606:4700::1"]}
        for name in world.names:
            code, found = await ask(world, name)
            assert code == 0
            assert is_synthetic(found[0])
            assert world.names_table.names(found[0]) == (name,)


@run
async def test_what_is_not_allowed_never_leaves_the_host(tmp_path: Path) -> None:
    rules = (
        rule("no", Action.DENY, hosts=("denied.test",), protocol=None),
        rule("ask", Action.ASK, hosts=("asked.test",)),
    )
    async with bench(tmp_path, *rules) as world:
        assert await ask(world, "denied.test") == (Code.NXDOMAIN, [])
        for name in ("asked.test", "other.test"):
            code, found = await ask(world, name)
            assert (code, is_synthetic(found[0])) == (0, True)
        assert world.lookups == []
        assert [row.decision for row in world.rows.questions] == ["denied", "synthetic", "synthetic"]


@run
async def test_there_is_no_ipv6_and_nothing_but_addresses(tmp_path: Path) -> None:
    async with bench(
        tmp_path, sites("site.test"), rule("no", Action.DENY, hosts=("denied.test",), protocol=None)
    ) as world:
        for kind in (Kind.AAAA, Kind.HTTPS, Kind.SVCB):
            assert await ask(world, "site.test", kind) == (Code.OK, [])
            assert await ask(world, "other.test", kind) == (Code.OK, [])
            assert await ask(world, "denied.test", kind) == (Code.NXDOMAIN, [])
        for kind in (Kind.TXT, Kind.MX, Kind.ANY, Kind.NS, 999):
            assert await ask(world, "site.test", kind) == (Code.REFUSED, [])
        assert world.lookups == []


@run
async def test_the_words_of_the_hosts_resolver_are_kept_apart(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("site", hosts=("*.test", "site.test"))) as world:

        def lookup(name: str) -> list[str]:
            raise socket.gaierror(socket.EAI_NONAME if name == "no.test" else socket.EAI_AGAIN, "word")

        world.resolver._lookup = lookup
        assert await ask(world, "no.test") == (Code.NXDOMAIN, [])
        assert await ask(world, "later.test") == (Code.SERVFAIL, [])
        assert [row.decision for row in world.rows.questions] == ["error", "error"]


@run
async def test_names_that_are_no_host_names_do_not_exist(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("all", hosts=("*",))) as world:
        for name in ("a b.test", "127.0.0.1", "a/b.test"):
            assert await ask(world, name) == (Code.NXDOMAIN, [])
        assert world.lookups == []


@run
async def test_questions_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "RATE", 0.0)
    async with bench(tmp_path) as world:
        codes = [(await ask(world, f"{each}.test"))[0] for each in range(lookups.BURST + 5)]
        assert codes == [Code.OK] * lookups.BURST + [Code.SERVFAIL] * 5
        assert len(world.rows.questions) == lookups.BURST


@run
async def test_questions_for_one_name_at_once_are_one_look_up(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("site", hosts=("site.test",))) as world:
        world.names["site.test"] = ["93.184.215.14"]
        answers = await asyncio.gather(*(ask(world, "site.test") for _ in range(5)))
        assert answers == [(0, ["93.184.215.14"])] * 5
        assert world.lookups == ["site.test"]
