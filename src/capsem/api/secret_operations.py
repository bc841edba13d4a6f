"""Rows of the table of operations: secrets that may be lent to VMs."""

from __future__ import annotations

from typing import Final

from capsem.api.operation import FINISH, Operation
from capsem.model.errors import Corrupt, HostNotReady, InvalidInput, NotFound

SECRET_OPERATIONS: Final = (
    Operation(
        "secrets",
        "GET",
        "/secrets",
        "the secrets that may be lent, without their values",
        "SecretsResponse",
        retry_safe=True,
    ),
    Operation(
        "set_secret",
        "POST",
        "/secrets/{name}",
        "define a secret in the user's settings, and keep its value if one is given; VMs that it is lent to have the new one",
        "SecretInfo",
        request="SetSecretRequest",
        errors=(InvalidInput, HostNotReady, Corrupt),
        retry_safe=True,
        on_disconnect=FINISH,
        answer_within=60.0,
    ),
    Operation(
        "remove_secret",
        "DELETE",
        "/secrets/{name}",
        "take a secret out of the user's settings, and forget its value; VMs that it is lent to have it no more",
        "SuccessResponse",
        errors=(InvalidInput, NotFound, HostNotReady, Corrupt),
        on_disconnect=FINISH,
        answer_within=60.0,
    ),
    Operation(
        "test_secret",
        "POST",
        "/secrets/{name}/test",
        "whether the value of a secret can be had now",
        "SecretTestResponse",
        errors=(InvalidInput, NotFound),
        retry_safe=True,
        answer_within=60.0,
    ),
)
