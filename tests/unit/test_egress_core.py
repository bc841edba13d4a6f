"""The proxy core, between clients in memory and real origins on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capsem.egress.facts import Action, Layer, TlsMode
from egress_bench import answering, bench, rule, run, sites

GET = b"GET /path?query HTTP/1.1\r\nHost: site.test\r\n\r\n"


@run
async def test_tls_is_ended_and_requests_reach_the_origin(tmp_path: Path) -> None:
    seen: list[bytes] = []
    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(answering(seen=seen), "site.test")
        client = await world.tls("site.test", port=port)
        for _ in range(3):
            await client.send(GET)
            assert (await client.answer())[::2] == (200, b"hello")
    assert seen == [GET] * 3
    assert world.lookups == ["site.test"], "kept connections are used again"
    row = world.rows.requests[2]
    assert (row.domain, row.port, row.decision, row.method, row.path) == ("site.test", port, "allowed", "GET", "/path")
    assert (row.status_code, row.bytes_received, row.matched_rule, row.rule_layer) == (200, 5, "sites", "vm")
    assert (row.address, row.tls, row.process_name) == ("127.0.0.1", TlsMode.INTERCEPTED, "curl")


@run
async def test_a_denied_request_gets_a_page_that_says_why(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("no-ads", Action.DENY, layer=Layer.CORPORATE, hosts=("ads.test",))) as world:
        client = await world.tls("ads.test")
        await client.send(b"GET / HTTP/1.1\r\nHost: ads.test\r\n\r\n")
        status, headers, body = await client.answer()
        assert (status, headers["x-capsem-decision"], headers["x-capsem-rule"]) == (403, "denied", "no-ads")
        page = json.loads(body)
        assert page["layer"] == "corporate"
        assert "do not retry" in page["hint"]
        assert "remedy" not in page
        await client.send(b"GET / HTTP/1.1\r\nHost: ads.test\r\nAccept: text/html,*/*\r\n\r\n")
        status, headers, body = await client.answer()
        assert (status, headers["content-type"]) == (403, "text/html; charset=utf-8")
    assert world.lookups == [], "a denied name is never looked up"
    assert [row.decision for row in world.rows.requests] == ["denied", "denied"]


@run
async def test_plain_http_and_both_forms_of_a_proxy(tmp_path: Path) -> None:
    seen: list[bytes] = []
    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(answering(seen=seen))
        client = world.plain(port=port)
        await client.send(b"GET / HTTP/1.1\r\nHost: site.test\r\n\r\n")
        assert (await client.answer())[0] == 200
        client = world.plain(port=3128, explicit=True)
        await client.send(
            b"GET http://site.test:%d/a HTTP/1.1\r\nHost: site.test\r\nProxy-Connection: x\r\n\r\n" % port
        )
        assert (await client.answer())[0] == 200
        secure = await world.origin(answering(seen=seen), "site.test")
        client = world.plain(port=3128, explicit=True)
        await client.send(b"CONNECT site.test:%d HTTP/1.1\r\nHost: site.test:%d\r\n\r\n" % (secure, secure))
        assert b" 200 " in await client.until(b"\r\n\r\n")
        client = await world.tls("site.test", client.raw)
        await client.send(GET)
        assert (await client.answer())[0] == 200
    assert [each.split(b"\r\n")[0] for each in seen] == [
        b"GET / HTTP/1.1",
        b"GET /a HTTP/1.1",
        b"GET /path?query HTTP/1.1",
    ]
    assert b"Proxy-Connection" not in seen[1]


@pytest.mark.parametrize("name", ["other.test", "192.0.2.7"])
@run
async def test_a_host_other_than_the_one_of_tls_is_misdirected(tmp_path: Path, name: str) -> None:
    async with bench(tmp_path, sites("site.test", "other.test")) as world:
        client = await world.tls("site.test")
        await client.send(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        assert (await client.answer())[0] == 421
        assert await client.rest() == b""
    assert world.rows.requests[0].decision == "denied"
