"""What calls cost, by a price list with a date: `prices.toml` beside this module, and a list of the user's own before it.

A model is found by its name, or its name with a date or version behind it ("-20250929", "-2025-08-07", "-001", "-latest",
"@20250929"). A model that is on no list has no price, nor has a call outside of what a price is for: nothing is guessed.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from capsem.egress.taps.found import Found
from capsem.model.errors import InvalidInput

FILE: Final = "prices.toml"
_MILLION: Final = 1_000_000
_RATES: Final = ("input", "output", "cache_read", "cache_write", "cache_write_1h")
_VERSION: Final = re.compile(r"(?:[-@](?:\d{8}|\d{4}-\d{2}-\d{2}|\d{3}|latest))?$")


class Cost(NamedTuple):
    """US dollars, and the date of the list that they are by. None with a reason where there is no price."""

    dollars: float | None
    date: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million tokens, by `_RATES`; one that is missing is not known. `up_to`: for calls of at most so many
    input tokens, `until`: for calls until the end of that day."""

    date: str
    rates: Mapping[str, float]
    up_to: int | None = None
    until: datetime.date | None = None


class Prices:
    """A list of prices."""

    def __init__(self, lists: Sequence[Mapping[str, Any]]) -> None:
        """`lists` as the files have them, the most important first. Raises InvalidInput."""
        self._prices: dict[tuple[str, str], list[Price]] = {}
        for listed in reversed(lists):
            self._prices.update(_read(listed))

    def cost(self, provider: str, found: Found, day: datetime.date) -> Cost:
        """Of a call of which this was found out, on this day."""
        if found.unpriced is not None:
            return Cost(None, None, found.unpriced)
        if found.model is None or found.input_tokens is None or found.output_tokens is None:
            return Cost(None, None)
        prices = self._of(provider, found.model)
        if not prices:
            return Cost(None, None, f"{found.model[:80]} of {provider} is on no price list")
        for price in prices:
            if (price.up_to is None or found.input_tokens <= price.up_to) and (
                price.until is None or day <= price.until
            ):
                return _cost(price, found)
        return Cost(None, None, f"the price list says nothing of such a call of {found.model[:80]}")

    def _of(self, provider: str, model: str) -> list[Price]:
        name = model.rpartition("/")[2]  # "models/gemini-..."
        for candidate in (name, _VERSION.sub("", name)):
            if found := self._prices.get((provider, candidate)):
                return found
        return []


def _cost(price: Price, found: Found) -> Cost:
    assert found.input_tokens is not None
    assert found.output_tokens is not None
    read, written = found.cache_read or 0, found.cache_write or 0
    hour = min(found.cache_write_hour or 0, written)
    parts = (
        (max(0, found.input_tokens - read - written), price.rates.get("input"), "input"),
        (read, price.rates.get("cache_read"), "reading a cache"),
        (written - hour, price.rates.get("cache_write"), "writing a cache"),
        (hour, price.rates.get("cache_write_1h"), "writing a cache for an hour"),
        (found.output_tokens, price.rates.get("output"), "output"),
    )
    total = 0.0
    for tokens, rate, what in parts:
        if tokens and rate is None:
            return Cost(None, None, f"the price list does not say what {what} costs")
        total += tokens * (rate or 0.0)
    return Cost(total / _MILLION, price.date)


def load(own: Path | None = None) -> Prices:
    """The package's list, after the user's `own` if there is one. Raises InvalidInput, which names the file."""
    lists = [tomllib.loads(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))]
    if own is not None and own.exists():
        try:
            lists.insert(0, tomllib.loads(own.read_text(encoding="utf-8")))
            return Prices(lists)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, InvalidInput, OSError) as error:
            raise InvalidInput(f"{own} is no price list: {error}", hint="docs/ledger.md has its form") from error
    return Prices(lists)


def _read(listed: Mapping[str, Any]) -> dict[tuple[str, str], list[Price]]:
    found: dict[tuple[str, str], list[Price]] = {}
    for provider, table in listed.items():
        if not isinstance(table, dict) or not isinstance(date := table.get("date"), datetime.date):
            raise InvalidInput(f"[{provider}] has no date")
        for model, rows in table.items():
            if model != "date":
                entries = rows if isinstance(rows, list) else [rows]
                found[provider, model] = [_price(f"{provider} {model}", entry, date) for entry in entries]
    return found


def _price(where: str, entry: Any, date: datetime.date) -> Price:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{where}: a price is a table such as {{ input = 3.0, output = 15.0 }}")
    rates = {name: entry[name] for name in _RATES if name in entry}
    bad = [name for name, rate in rates.items() if type(rate) not in (int, float) or not 0 <= rate < _MILLION]
    up_to, until = entry.get("up_to"), entry.get("until")
    unknown = entry.keys() - {*_RATES, "up_to", "until"}
    if (
        bad
        or unknown
        or not (up_to is None or type(up_to) is int)
        or not (until is None or isinstance(until, datetime.date))
    ):
        raise InvalidInput(f"{where}: {', '.join((*bad, *sorted(unknown))) or 'up_to or until'} is not as it should be")
    return Price(date.isoformat(), rates, up_to, until)
