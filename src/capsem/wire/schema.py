"""What a message is: typed fields, checked when one is made, and a JSON object with a type tag "t" on the
wire, whose unknown keys are ignored.

Standard library only, and little of that: the guest's agent imports it under emulation.
"""

from __future__ import annotations

import json

from capsem.wire.frames import MAX_MESSAGE, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, dataclass_transform
else:

    def dataclass_transform(**_):
        """Nothing at run time: the guest does not pay for importing typing."""
        return lambda cls: cls


_MISSING = object()
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "list[str]": (list,),
    "dict[str, str]": (dict,),
    "dict[str, float]": (dict,),
    "None": (type(None),),
}


def _in_bounds(value: Any) -> bool:
    """Integers fit 64 bits, other numbers are finite: what comes from a peer can be computed with."""
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return not isinstance(value, float) or value - value == 0.0


def _checker(annotation: str) -> Any:
    """A predicate for values of one annotated type, written as in the classes below."""
    alternatives = [part.strip() for part in annotation.split("|")]
    types = tuple(kind for part in alternatives for kind in _KINDS[part])
    inner: tuple[type, ...] | None = None
    if "list[str]" in alternatives or "dict[str, str]" in alternatives:
        inner = (str,)
    elif "dict[str, float]" in alternatives:
        inner = (float, int)

    def check(value: Any) -> bool:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return False
        if inner and isinstance(value, (list, dict)):
            items = value.values() if isinstance(value, dict) else value
            return all(isinstance(item, inner) and _in_bounds(item) for item in items)
        return _in_bounds(value)

    return check


@dataclass_transform(kw_only_default=True)
class Message:
    """Base of all messages: keyword arguments, typed fields, a tag that stands for the class on the wire."""

    tag: ClassVar[str]
    _fields: ClassVar[dict[str, tuple[Any, Any]]] = {}
    __slots__ = ("__dict__",)

    def __init_subclass__(cls, tag: str) -> None:
        cls.tag = tag
        own = {name: kind for name, kind in cls.__annotations__.items() if not name.startswith("_")}
        cls._fields = {name: (_checker(kind), cls.__dict__.get(name, _MISSING)) for name, kind in own.items()}

    def __init__(self, **values: Any) -> None:
        for name, (check, default) in self._fields.items():
            value = values.pop(name, default)
            if value is _MISSING:
                raise ProtocolError(f"{self.tag}: {name} is missing")
            if value is not default and not check(value):
                raise ProtocolError(f"{self.tag}: bad {name}")
            self.__dict__[name] = value
        if values:
            raise TypeError(f"{self.tag}: unknown field {next(iter(values))}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={str(value)[:60]!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({shown})"


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


# Made once: under emulation, what a machine that was just restored does for the first time is felt.
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def encode_message(message: Message) -> bytes:
    """The JSON form. Raises ProtocolError when it is over the frame limit."""
    fields = {name: value for name, value in message.__dict__.items() if value != message._fields[name][1]}
    payload = _ENCODER.encode({"t": message.tag, **fields}).encode("ascii")
    if len(payload) > MAX_MESSAGE:
        raise ProtocolError(f"{message.tag} message of {len(payload)} bytes is over the limit of {MAX_MESSAGE}")
    return payload


class UnknownMessage(ProtocolError):
    """Well-formed, but of a kind that this version does not know."""


def decode_message(payload: bytes, messages: dict[str, type[Message]]) -> Message:
    """The message in a frame's payload, one of `messages` (tag -> class). Raises ProtocolError, whatever the bytes."""
    try:
        fields = _DECODER.decode(payload.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"message is not JSON: {str(error)[:80]}") from None
    if not isinstance(fields, dict):
        raise ProtocolError("message is not an object")
    tag = fields.pop("t", None)
    cls = messages.get(tag) if isinstance(tag, str) else None
    if cls is None:
        raise UnknownMessage(f"unknown message {str(tag)[:40]!r}")
    return cls(**{name: value for name, value in fields.items() if name in cls._fields})
