"""Names and ids. A VM's id becomes a file name and a host name, so one rule holds wherever a name enters."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from capsem.model.errors import InvalidInput

NAME_LIMIT = 64
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_NAME = re.compile(NAME_PATTERN + r"\Z")
_OBJECT_ID = re.compile(r"[0-9a-f]{32}\Z")

ADJECTIVES = (
    "amber brave brisk calm clear clever cobalt coral crisp deft eager early fair fleet fresh gentle glad golden grand "
    "green happy hardy honest humble jolly keen kind light lively lucid lucky mellow mild neat nimble noble olive plain "
    "plucky proud quick quiet rapid ready royal rustic sharp silent silver sleek smart snowy solid spry steady still "
    "sturdy sunny swift tidy tiny true vivid warm wise witty"
).split()
NOUNS = (
    "alder aspen badger beacon birch bison brook canyon cedar cliff comet crane creek delta dune eagle ember falcon fern "
    "finch fjord forest fox gale glade harbor hare hawk hazel heron hill island ivy jay kestrel lagoon lake lark larch "
    "lynx maple marsh meadow mesa moose oak ocean orchid osprey otter owl panda peak pebble pine plover pond quail rapids "
    "raven reef ridge river robin sage salmon shore sparrow spruce stone stork summit swan tern thistle tide trout valley "
    "walnut willow wren"
).split()


def check_name(name: str) -> str:
    """Return `name` if it may name a VM: 1..64 of ASCII letters, digits, "-", "_", starting with a letter or digit.

    Raises InvalidInput.
    """
    if not _NAME.match(name):
        raise InvalidInput(
            f"bad name {name[:80]!r}",
            hint=f'use 1 to {NAME_LIMIT} letters, digits, "-" or "_", beginning with a letter or digit',
        )
    return name


def check_object_id(text: str) -> str:
    """Return `text` if it is the id of a stored object (layer, RAM file, checkpoint): 32 lower-case hex digits."""
    if not _OBJECT_ID.match(text):
        raise InvalidInput(f"bad object id {text[:80]!r}", hint="ids are 32 hexadecimal digits")
    return text


def generate_id(choose: Callable[[Sequence[str]], str], taken: Collection[str]) -> str:
    """An id for an unnamed VM, adjective-noun-tmp, its first word not shared with a VM in `taken` while words last."""
    used = {name.split("-", 1)[0] for name in taken}
    free = [word for word in ADJECTIVES if word not in used] or ADJECTIVES
    while True:
        name = f"{choose(free)}-{choose(NOUNS)}-tmp"
        if name not in taken:
            return name
