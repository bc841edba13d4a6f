"""The authority's file for those who sign nothing: its certificate, without the library that could make another."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Final

FILE: Final = "egress-ca.pem"  # key and certificate in one file, so that they can never be of different pairs
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----\n"


class AuthorityError(Exception):
    """The authority's file cannot be used; the message says what to do."""


def certificate(path: Path, content: bytes) -> str:
    """The certificate (PEM) in the content of the authority's file `path`. Raises AuthorityError when that is not a
    certificate with its key.
    """
    begin, end = content.find(_BEGIN), content.find(_END)
    try:
        load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), content)
    except ssl.SSLError as error:
        raise AuthorityError(f"{path} is damaged ({error}): `capsem net ca rotate` makes a new one") from error
    return content[begin : end + len(_END)].decode("ascii")


def load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """Key and certificate, by way of an anonymous file in memory. Raises ssl.SSLError, OSError."""
    fd = os.memfd_create("chain", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
