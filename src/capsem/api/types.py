"""What all bodies between clients and the service have in common, and the answers that are about nothing in particular.

The others stand by idea: `vm_types`, `exec_types`, `file_types`, `checkpoint_types`, `usage_types`, `ledger_types`,
`host_types`. Each request and each answer is there once; their names are unique over all these modules.

Requests are lenient where the contract is: unknown keys are ignored, an optional key may be null. They are strict
about types and names; what is wrong raises InvalidInput while decoding (see codec.py). In answers an optional key
that has nothing to say is left out, never null. Sizes are in MiB (`*_mb`) or bytes (`*_bytes`), times in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from capsem.model.errors import InvalidInput
from capsem.model.ids import NAME_PATTERN
from capsem.model.spec import CPUS, DISK_MB, ENV_KEY_BYTES, ENV_VARS, RAM_MB
from capsem.wire.environment import BLOCKED_ENV

LONGEST_TIMEOUT = 10 * 365 * 86400  # beyond this a number of seconds is a mistake

_POSITIVE = msgspec.Meta(gt=0, le=LONGEST_TIMEOUT)
Seconds = Annotated[int, _POSITIVE] | Annotated[float, _POSITIVE]


def _said(**schema: object) -> msgspec.Meta:
    """What the OpenAPI document tells of a field, and code that finds better words for a mistake checks."""
    return msgspec.Meta(extra_json_schema=schema)


Name = Annotated[str, _said(pattern=f"^{NAME_PATTERN}$")]
Text = Annotated[str, _said(pattern=r"^[^\u0000]*$")]
Cpus = Annotated[int, _said(minimum=CPUS.start, maximum=CPUS.stop - 1)]
RamMb = Annotated[int, _said(minimum=RAM_MB.start, maximum=RAM_MB.stop - 1)]
DiskMb = Annotated[int, _said(minimum=DISK_MB.start, maximum=DISK_MB.stop - 1)]
Env = Annotated[
    dict[str, Text],
    _said(
        maxProperties=ENV_VARS,
        propertyNames={"pattern": r"^[^=\u0000]+$", "maxLength": ENV_KEY_BYTES, "not": {"enum": sorted(BLOCKED_ENV)}},
    ),
]


class Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A JSON object. A field without a default is always there."""


def no_nul(key: str, text: str) -> None:
    """Check a text that a program will be handed as an argument. Raises InvalidInput naming `key`."""
    if "\0" in text:
        raise InvalidInput(f"{key}: holds a NUL character", hint="remove it")


class SuccessResponse(Body, frozen=True):
    """It is done."""

    success: bool


class VersionResponse(Body, frozen=True):
    """The version of the service."""

    version: str


class TraceResponse(Body, frozen=True):
    """What processes did and when, as events of the Trace Event Format, in no particular order; `ts` and `dur` are
    microseconds of this host's CLOCK_MONOTONIC."""

    events: list[dict[str, Any]]


class OpenApiDocument(Body, frozen=True):
    """An OpenAPI document of this revision; every operation of the service is in it."""

    openapi: str
    info: dict[str, str]
    paths: dict[str, dict[str, Any]]
    components: dict[str, dict[str, Any]]


class ErrorBody(Body, frozen=True):
    """What an answer with an error's status holds: `error` is `message` with the `hint`; `code` is stable. `retry_after` is
    in seconds, `job` a command that may go on."""

    error: str
    code: str
    message: str
    hint: str | None = None
    retry_after: float | None = None
    job: str | None = None
