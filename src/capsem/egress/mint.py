"""The authority whose certificates the guests trust, and the certificates that it makes, one for each name that is wanted.

It is made once per installation and never leaves the host: whoever has its key could read what any machine says that trusts it.
Nothing that it signs is written to a disk: a leaf's way into OpenSSL leads through an anonymous file in memory.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from capsem.egress import hosts
from capsem.egress.authority import FILE, AuthorityError, load_chain
from capsem.store import durable

_AUTHORITY_LIFE: Final = datetime.timedelta(days=3650)
_LEAF_LIFE: Final = datetime.timedelta(days=7)
_BACKDATED: Final = datetime.timedelta(days=1)  # a guest's clock may be behind
_RENEW: Final = datetime.timedelta(days=2)  # before a leaf ends: its clock may be ahead
CONTEXTS: Final = 512


class Authority:
    """Key and certificate that sign leaves."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate

    @property
    def pem(self) -> bytes:
        """The certificate alone, for those who are to trust it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def sign(self, name: str, public_key: ec.EllipticCurvePublicKey, now: datetime.datetime) -> x509.Certificate:
        """A leaf for a host or an address."""
        subject: x509.GeneralName
        subject = x509.IPAddress(ipaddress.ip_address(name)) if hosts.address(name) else x509.DNSName(name)
        return (
            x509.CertificateBuilder()
            # A common name has 64 characters at most; clients look at the alternative names alone.
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if len(name) <= 64 else []))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + _LEAF_LIFE)
            .add_extension(x509.SubjectAlternativeName([subject]), critical=len(name) > 64)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def make(now: datetime.datetime, host: str) -> tuple[Authority, bytes]:
    """A new authority, and its file's content. `host` is told to whoever looks at the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Capsem egress on {host}"[:64])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(key, certificate)
    return authority, _private_pem(key) + authority.pem


def open_authority(home: Path, now: float, host: str, *, rotate: bool = False) -> Authority:
    """The authority of an installation, made if there is none; a new one in its place if `rotate`. `now` is seconds since
    1970. Raises AuthorityError for a file that is not what it should be, which is left as it is; OSError.
    """
    path = home / FILE
    if not rotate:
        try:
            return read_authority(home, path.read_bytes())
        except FileNotFoundError:
            pass
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority, content = make(datetime.datetime.fromtimestamp(now, datetime.UTC), host)
    if rotate:
        durable.write(path, content, mode=0o600)
        return authority
    return authority if durable.create(path, content) else read_authority(home, path.read_bytes())


def read_authority(home: Path, content: bytes) -> Authority:
    """What the content of an installation's file says. Raises AuthorityError."""
    path = home / FILE
    try:
        key = serialization.load_pem_private_key(content, password=None)
        certificate = x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise AuthorityError(f"{path} is damaged ({error}): `capsem net ca rotate` makes a new one") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise AuthorityError(
            f"{path} holds a key and a certificate that do not belong together: `capsem net ca rotate` makes a new one"
        )
    return Authority(key, certificate)


class Minter:
    """Contexts for the server's side of TLS, by name; the least recently used are forgotten.

    `wall` is the time in seconds since 1970. All leaves have one key, which lives as long as this.
    """

    def __init__(self, authority: Authority, wall: Callable[[], float]) -> None:
        self.authority = authority
        self._wall = wall
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_pem = _private_pem(self._key)
        self._contexts: OrderedDict[tuple[str, bool], tuple[float, ssl.SSLContext]] = OrderedDict()

    def context(self, name: str, *, http2: bool = False) -> ssl.SSLContext:
        """For a host or an address, offering HTTP/2 or not."""
        key, now = (name, http2), self._wall()
        found = self._contexts.get(key)
        # The wall clock may be set either way: a leaf must have begun and must not end soon.
        if (
            found is not None
            and abs(now - found[0]) < (_LEAF_LIFE - _RENEW).total_seconds()
            and found[0] - now < _BACKDATED.total_seconds()
        ):
            self._contexts.move_to_end(key)
            return found[1]
        leaf = self.authority.sign(name, self._key.public_key(), datetime.datetime.fromtimestamp(now, datetime.UTC))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
        context.num_tickets = (
            0  # a ticket's key would live as long as the context, and a fork's guest could try its source's
        )
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        load_chain(context, self._key_pem + leaf.public_bytes(serialization.Encoding.PEM))
        self._contexts[key] = (now, context)
        if len(self._contexts) > CONTEXTS:
            self._contexts.popitem(last=False)
        return context


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
