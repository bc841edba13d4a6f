"""Secrets and models on real VMs: programs in the guest against servers of this computer, and what is left on disk."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from origins import STREAMS, Origins, serving
from real_service import SMALL, Service, children, running_service

SECRET = "sk-the-real-one-0123456789abcdef"
FORMS = (SECRET.encode(), base64.b64encode(b"me:" + SECRET.encode()), base64.b64encode(SECRET.encode()))
PRICES = '["llm.test"]\ndate = 2026-01-01\n'
PRICES += "claude-sonnet-4-5 = { input = 3, output = 15, cache_read = 0.3, cache_write = 3.75, cache_write_1h = 6 }\n"


@pytest.fixture(scope="module")
def origins() -> Iterator[Origins]:
    with tempfile.TemporaryDirectory(prefix="capsem-origins-") as directory, serving(Path(directory)) as served:
        yield served


@pytest.fixture(scope="module")
def lent(origins: Origins) -> Iterator[Service]:
    """A service with a secret for mirror.test and llm.test, and the VM `box` that it is lent to."""
    environment = {"CAPSEM_HOSTS": str(origins.hosts), "PYTHON_KEYRING_BACKEND": "keyring.backends.fail.Keyring"}
    with running_service(**environment) as service:
        (service.home / "prices.toml").write_text(PRICES)
        options = ["--host", "mirror.test", "--host", "llm.test", "--env", "API_KEY", "--query"]
        done = service.cli("secret", "set", "key", *options, stdin=SECRET.encode())
        assert done.returncode == 0, done.stderr
        network = {"policy": origins.policy(model="anthropic")}
        body = {"name": "box", "persistent": True, "secrets": ["key"], "network": network, **SMALL}
        service.client.call("provision", body=body)
        yield service


def curl(service: Service, vm: str, url: str, *options: str) -> tuple[int, str]:
    """What the guest's curl gets: status and body."""
    out = service.output(
        vm, f"curl -sS -o /root/out -w '%{{http_code}}' {' '.join(options)} '{url}'; echo; cat /root/out"
    )
    status, _, body = out.partition("\n")
    return int(status), body


def rows(service: Service, vm: str, sql: str) -> list[list[Any]]:
    found: list[list[Any]] = service.client.call("inspect", vm_id=vm, body={"sql": sql})["rows"]
    return found


BEARER = '-H "Authorization: Bearer $API_KEY"'


def test_the_origin_sees_the_secret_and_the_guest_does_not(lent: Service, origins: Origins) -> None:
    own = lent.output("box", "printenv API_KEY").strip()
    assert own.startswith("capsem-key-")
    for option, expected in (
        (BEARER, f"Bearer {SECRET}"),
        ('-u "me:$API_KEY"', "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()),
    ):
        status, body = curl(lent, "box", origins.url("mirror"), option)
        assert (status, origins.seen[-1]["headers"]["authorization"]) == (200, expected)
        assert SECRET not in body
        assert base64.b64encode(f"me:{SECRET}".encode()).decode() not in body
    status, body = curl(lent, "box", origins.url("mirror"), '-G --data-urlencode "key=$API_KEY"')
    assert f"key={SECRET}" in origins.seen[-1]["target"]
    assert SECRET not in body
    shown = rows(lent, "box", "SELECT DISTINCT decision, secrets, tls FROM net_events WHERE domain = 'mirror.test'")
    assert shown == [["allowed", "key", "intercepted"]]


def test_it_goes_nowhere_else(lent: Service, origins: Origins) -> None:
    before = len(origins.seen)
    status, body = curl(lent, "box", origins.url("other"), BEARER)
    assert (status, "may go to mirror.test and llm.test alone" in body) == (403, True)
    assert len(origins.seen) == before
    status, body = curl(lent, "box", origins.url("mirror", "/redirect"), "-L --location-trusted", BEARER)
    assert (status, "on its way to other.test" in body) == (403, True)
    assert [each["host"] for each in origins.seen[before:]] == ["mirror.test"]
    denied = rows(lent, "box", "SELECT domain, decision, secrets, error FROM net_events WHERE decision = 'denied'")
    assert [each[:3] for each in denied] == [["other.test", "denied", "key"]] * 2
    assert "nothing was sent" in denied[0][3]


def test_a_call_of_a_model_has_its_row(lent: Service, origins: Origins) -> None:
    request = (STREAMS / "anthropic-stream.request.json").read_text()
    lent.client.call("write_file", vm_id="box", body={"path": "request.json", "content": request})
    status, body = curl(
        lent, "box", origins.url("llm", "/v1/messages"), '-H "x-api-key: $API_KEY" -d @/root/request.json'
    )
    assert (status, body.strip()) == (200, (STREAMS / "anthropic-stream.sse").read_text().strip())
    assert origins.seen[-1]["headers"]["x-api-key"] == SECRET
    columns = (
        "provider, model, stream, input_tokens, output_tokens, cache_read_tokens, estimated_cost_usd, price_date, note"
    )
    assert rows(lent, "box", f"SELECT {columns} FROM model_calls") == [
        ["llm.test", "claude-sonnet-4-5-20250929", 1, 43000, 300, 40000, 0.030375, "2026-01-01", None]
    ]
    assert rows(lent, "box", "SELECT tool_name, arguments FROM tool_calls") == [
        ["read_file", '{"path": "notes.txt"}'],
        ["stat", "{}"],
    ]
    info = lent.client.call("info", vm_id="box")
    assert (info["model_call_count"], info["total_input_tokens"], info["total_tool_calls"]) == (1, 43000, 2)
    assert info["total_estimated_cost"] == pytest.approx(0.030375)
    stats = lent.client.call("stats")
    assert [each["provider"] for each in stats["top_providers"]] == ["llm.test"]


def test_a_fork_cannot_use_what_its_source_was_lent(lent: Service, origins: Origins) -> None:
    own = lent.output("box", "printenv API_KEY").strip()
    lent.output("box", f"echo {own} > /root/taken")
    lent.client.call("fork", vm_id="box", body={"name": "plain", "live": True})
    lent.client.call("fork", vm_id="box", body={"name": "heir", "live": True, "inherit_secrets": True})
    before = len(origins.seen)
    with_taken = '-H "Authorization: Bearer $(cat /root/taken)"'
    status, body = curl(lent, "plain", origins.url("mirror"), with_taken)
    assert (status, "perhaps to box, which this one is a fork of" in body) == (403, True)
    assert lent.exec("plain", "printenv API_KEY")[0] == 1
    assert len(origins.seen) == before
    heirs = lent.output("heir", "printenv API_KEY").strip()
    assert heirs != own
    for option in (BEARER, with_taken):
        assert curl(lent, "heir", origins.url("mirror"), option)[0] == 200
        assert origins.seen[-1]["headers"]["authorization"] == f"Bearer {SECRET}"
    for name in ("plain", "heir"):
        lent.client.call("delete", vm_id=name)


def test_nothing_that_is_left_of_it_holds_the_secret(lent: Service, origins: Origins) -> None:
    """After everything above: memory, layers, device state, databases, logs, records; arguments and environments. Nor the key of
    the authority that VMs trust."""
    authority = forms_of_key(lent.home / "egress-ca.pem")
    assert curl(lent, "box", origins.url("mirror"), BEARER)[0] == 200
    supervisor = lent.client.call("info", vm_id="box")["pid"]
    for pid in (lent.process.pid, supervisor, *children(supervisor)):
        for file in ("cmdline", "environ"):
            assert SECRET.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()
    lent.client.call("checkpoint", vm_id="box", body={})
    lent.client.call("suspend", vm_id="box")
    assert holding(lent.home, FORMS) == ["secrets.json"]
    assert holding(lent.home, authority) == ["egress-ca.pem"]
    lent.client.call("resume", vm_id="box")
    assert curl(lent, "box", origins.url("mirror"), BEARER)[0] == 200
    assert origins.seen[-1]["headers"]["authorization"] == f"Bearer {SECRET}"
    bundle = lent.home / "bundle.tar.gz"
    done = lent.cli("support-bundle", str(bundle))
    assert done.returncode == 0, done.stderr
    with tarfile.open(bundle) as archive:
        files = [archive.extractfile(member) for member in archive if member.isfile()]
        texts = [file.read() for file in files if file is not None]
        assert len(texts) > 3
        assert not any(form in text for text in texts for form in (*FORMS, *authority))
    lent.client.call("stop", vm_id="box")
    assert holding(lent.home, FORMS) == ["secrets.json"]
    database = sqlite3.connect(f"file:{lent.run_dir}/persistent/box/session.db?mode=ro", uri=True)
    assert database.execute("SELECT count(*) FROM net_events WHERE secrets = 'key'").fetchone()[0] > 5
    database.close()


def forms_of_key(path: Path) -> tuple[bytes, ...]:
    """A private key as it may stand somewhere: its number, and a line of its PEM that is nothing but that."""
    text = path.read_bytes()
    key = serialization.load_pem_private_key(text, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_numbers().private_value.to_bytes(32, "big"), text.splitlines()[2]


def holding(home: Path, forms: tuple[bytes, ...]) -> list[str]:
    """Files that hold one of the texts, looked into byte by byte."""
    found = []
    for path in sorted(each for each in home.rglob("*") if each.is_file() and not each.is_symlink()):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # what is collected meanwhile is not left
            tail = b""
            while block := file.read(4 << 20):
                if any(form in tail + block for form in forms):
                    found.append(path.name)
                    break
                tail = block[-100:]
    return found


def test_a_secret_that_changes_while_its_vm_runs(lent: Service, origins: Origins) -> None:
    lent.client.call("resume", vm_id="box")
    options = ["--host", "mirror.test", "--env", "API_KEY"]
    assert lent.cli("secret", "set", "key", *options, stdin=b"another-value-9876543210").returncode == 0
    assert curl(lent, "box", origins.url("mirror"), BEARER)[0] == 200
    assert origins.seen[-1]["headers"]["authorization"] == "Bearer another-value-9876543210"
    assert json.loads((lent.home / "secrets.json").read_text()) == {"capsem/key": "another-value-9876543210"}
    assert lent.cli("secret", "rm", "key").returncode == 0
    status, body = curl(lent, "box", origins.url("mirror"), BEARER)
    assert (status, "was taken back" in body) == (403, True)
