"""docs/sdk-reference.md, made from the SDK's signatures and docstrings: `python -m capsem.sdk.reference`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import capsem
from capsem.model.errors import CapsemError
from capsem.sdk.network import Network
from capsem.sdk.sync import Files, Process, Sandbox
from capsem.sdk.types import Output, Result

HEAD = """# Python SDK: reference

Generated from the docstrings of `capsem.sdk` by `make docs`; do not edit. [The guide](sdk.md) comes first.

`AsyncSandbox` and `AsyncProcess` have the same methods with the same parameters, awaited; `async with await
AsyncSandbox.create() as box` and `async for piece in process`. A call that is cancelled hangs up: a command that it
waited for is killed, a change of a VM is finished.

What the methods answer with, such as `SandboxInfo`, are the types of [the HTTP reference](http.md#types), as objects.
"""


def to_markdown() -> str:
    """The page."""
    lines = [HEAD]
    for kind, name in (
        (Sandbox, "Sandbox"),
        (Files, "Sandbox.files"),
        (Network, "Sandbox.network"),
        (Process, "Process"),
    ):
        lines += [f"## {name}", "", inspect.getdoc(kind) or "", ""]
        lines += _members(kind)
    for record in (Result, Output):
        lines += [f"## {record.__name__}", "", _flat(inspect.getdoc(record)), "", "| field | type |", "|---|---|"]
        lines += [
            f"| `{field}` | `{_plain(getattr(hint, '__forward_arg__', str(hint))).replace('|', chr(92) + '|')}` |"
            for field, hint in record.__annotations__.items()
        ]
        lines += ["", *_members(record)]
    lines += ["## Errors", "", "All are `capsem.CapsemError`s, with a `message`, a `hint` and a stable `code`.", ""]
    lines += ["| error | code | when |", "|---|---|---|"]
    for name in dir(capsem):
        error = getattr(capsem, name)
        if isinstance(error, type) and issubclass(error, CapsemError):
            lines.append(f"| `{name}` | {error.code} | {_flat(inspect.getdoc(error))} |")
    return "\n".join(lines) + "\n"


def _members(kind: type) -> Iterator[str]:
    for name, member in vars(kind).items():
        if (
            name.startswith("_")
            or name == "of"
            or (not isinstance(member, (property, classmethod)) and not callable(member))
        ):
            continue
        function: Any = member.fget if isinstance(member, property) else getattr(kind, name)
        if isinstance(member, property):
            yield f"### {name}"
        else:
            signature = inspect.signature(function)
            plain = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
            yield f"### {name}{_plain(str(signature.replace(parameters=plain)))}"
        yield ""
        yield inspect.getdoc(function) or ""
        yield ""


def _plain(text: str) -> str:
    """An annotation as people write it."""
    text = re.sub(r"builtins\.|os\.|<Signals\.SIGKILL: 9>", lambda m: "SIGKILL" if "Signals" in m[0] else "", text)
    return text.replace("b''", 'b""').replace("'", "")


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.write(to_markdown())
