"""Layers between their making and their naming. In between they look like those that nobody needs.

Whoever is about to name a layer in a record, one that it makes or was handed, shares a lock from when it sees the layer
there until the record is durable. Who sweeps has the lock alone, and reads the records then: a layer that none of them
names, nobody is about to name; who was handed it finds it gone. The kernel frees the lock when its holder dies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from capsem.model.errors import Unavailable
from capsem.store.layout import Layout
from capsem.store.locks import Lock
from capsem.store.waiting import wait_for_lock

NAMING_LIMIT: Final = 10.0  # seconds; both sides hold it for as long as a disk takes to remember a record


async def take_naming(layout: Layout, *, shared: bool) -> Lock:
    """Raises Unavailable after NAMING_LIMIT; OSError."""
    try:
        async with asyncio.timeout(NAMING_LIMIT):
            return await wait_for_lock(layout.naming_lock, shared=shared)
    except TimeoutError:
        raise Unavailable("others are busy with the layers of volumes", hint="try again in a moment") from None


@contextlib.asynccontextmanager
async def naming(layout: Layout, *handed: str) -> AsyncIterator[None]:
    """While a record comes to name layers: new ones, or these, which somebody else has made.

    Raises Unavailable: one of them is not there any more, or it took too long; OSError.
    """
    lock = await take_naming(layout, shared=True)
    try:
        require(layout, *handed)
        yield
    finally:
        lock.release()


def require(layout: Layout, *handed: str) -> None:
    """Raises Unavailable when one of these layers is not there: a service that came after its maker has swept it."""
    if not all(layout.layer(layer).exists() for layer in handed):
        raise Unavailable("the service that had asked for this has ended", hint="try again")
