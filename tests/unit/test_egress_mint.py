"""The authority, and the leaves that it signs."""

from __future__ import annotations

import datetime
import os
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from capsem.egress import authority, mint
from capsem.egress.authority import FILE, AuthorityError
from capsem.egress.mint import Minter, open_authority

NOW = 1_800_000_000.0
HOUR = 3600.0


def leaf(minter: Minter, name: str, *, client: ssl.SSLContext) -> x509.Certificate:
    """What a client that trusts the authority is shown for a name; it checks all but the time. Raises ssl.SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(back, there, server_hostname=name)
    server = minter.context(name).wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for each in (ours, server):
            try:
                each.do_handshake()
            except ssl.SSLWantReadError:
                continue
    der = ours.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def trusting(authority: mint.Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.pem.decode())


def test_the_authority_is_made_once_and_for_nobody_else_to_read(tmp_path: Path) -> None:
    first = open_authority(tmp_path / "home", NOW, "box")
    again = open_authority(tmp_path / "home", NOW + 9, "box")
    assert first.fingerprint == again.fingerprint
    path = tmp_path / "home" / FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == [FILE], "nothing of its making is left"
    assert b"PRIVATE" not in first.pem
    constraints = first.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)


def test_rotating_makes_another(tmp_path: Path) -> None:
    first = open_authority(tmp_path, NOW, "box")
    second = open_authority(tmp_path, NOW, "box", rotate=True)
    assert first.fingerprint != second.fingerprint
    assert open_authority(tmp_path, NOW, "box").fingerprint == second.fingerprint


def test_of_several_who_make_it_at_once_one_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    create = mint.durable.create

    def late(path: Path, data: bytes) -> bool:
        monkeypatch.setattr(mint.durable, "create", create)
        found.append(open_authority(tmp_path, NOW, "other").fingerprint)
        return create(path, data)

    monkeypatch.setattr(mint.durable, "create", late)
    assert open_authority(tmp_path, NOW, "box").fingerprint == found[0]


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"])
def test_a_spoilt_file_is_told_of_and_left(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(AuthorityError, match="net ca rotate"):
        open_authority(tmp_path, NOW, "box")
    assert (tmp_path / FILE).read_bytes() == content
    with pytest.raises(AuthorityError, match="net ca rotate"):
        authority.certificate(tmp_path / FILE, content)


def test_the_certificate_alone_is_had_without_the_library_that_signs(tmp_path: Path) -> None:
    made = open_authority(tmp_path, NOW, "box")
    content = (tmp_path / FILE).read_bytes()
    assert authority.certificate(tmp_path / FILE, content) == made.pem.decode("ascii")
    code = "import sys, capsem.egress.authority; assert not {'cryptography', 'h2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_key_of_another_certificate_is_told_of(tmp_path: Path) -> None:
    for name in ("a", "b"):
        open_authority(tmp_path / name, NOW, "box")
    key = (tmp_path / "a" / FILE).read_bytes().partition(b"-----BEGIN CERTIFICATE")[0]
    certificate = open_authority(tmp_path / "b", NOW, "box").pem
    (tmp_path / "a" / FILE).write_bytes(key + certificate)
    with pytest.raises(AuthorityError, match="do not belong together"):
        open_authority(tmp_path / "a", NOW, "box")
    with pytest.raises(AuthorityError, match="net ca rotate"):
        authority.certificate(tmp_path / "a" / FILE, key + certificate)


@pytest.mark.parametrize(
    "name", ["site.test", "192.0.2.7", "2001:db8::7", "a" * 60 + ".long.name.that.has.more.than.64.characters.test"]
)
def test_a_leaf_is_for_its_name_alone(tmp_path: Path, name: str) -> None:
    now = datetime.datetime.now(datetime.UTC).timestamp()
    authority = open_authority(tmp_path, now, "box")
    minter = Minter(authority, lambda: now)
    shown = leaf(minter, name, client=trusting(authority))
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(each.value) for each in names] == [name]
    assert not shown.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(ssl.SSLError):
        leaf(minter, name, client=trusting(mint.make(datetime.datetime.now(datetime.UTC), "other")[0]))


def test_a_clock_that_is_off_by_an_hour_does_no_harm(tmp_path: Path) -> None:
    now = [NOW]
    minter = Minter(open_authority(tmp_path, NOW, "box"), lambda: now[0])

    def lifetime(name: str) -> tuple[float, float]:
        shown = leaf(minter, name, client=unverified())
        return shown.not_valid_before_utc.timestamp(), shown.not_valid_after_utc.timestamp()

    begin, end = lifetime("site.test")
    assert begin <= NOW - 23 * HOUR
    assert end >= NOW + 24 * 6 * HOUR
    # The host's own clock is set, either way: a leaf is made anew where the old one would not hold.
    for moved in (NOW + 24 * 6 * HOUR, NOW - 24 * 3 * HOUR):
        now[0] = moved
        begin, end = lifetime("site.test")
        assert begin < moved - HOUR
        assert end > moved + HOUR


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def test_contexts_are_kept_but_not_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mint, "CONTEXTS", 2)
    minter = Minter(open_authority(tmp_path, NOW, "box"), lambda: NOW)
    first = minter.context("1.test")
    assert minter.context("1.test") is first
    minter.context("2.test")
    assert minter.context("1.test") is first
    minter.context("3.test")
    assert minter.context("1.test") is first, "the one used last stays"
    assert minter.context("2.test", http2=True) is not minter.context("2.test")
    assert len(minter._contexts) == 2


def test_no_leaf_touches_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        authority.os, "memfd_create", lambda *_: opened.append("memory") or os.open(os.devnull, os.O_RDWR)
    )
    minter = Minter(open_authority(tmp_path, NOW, "box"), lambda: NOW)
    with pytest.raises(ssl.SSLError):
        minter.context("site.test")
    assert opened == ["memory"]
