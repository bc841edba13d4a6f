"""Which names were given which addresses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from capsem.egress import names
from capsem.egress.names import NameTable, is_synthetic


def test_names_of_an_address_the_last_first() -> None:
    table = NameTable()
    table.learn("a.test", ["192.0.2.1", "192.0.2.2"])
    table.learn("b.test", ["192.0.2.1"])
    assert table.names("192.0.2.1") == ("b.test", "a.test")
    table.learn("a.test", ["192.0.2.1"])
    assert table.names("192.0.2.1") == ("a.test", "b.test")
    assert table.names("192.0.2.9") == ()


def test_a_synthetic_address_is_of_one_name_and_stays_so() -> None:
    table = NameTable()
    first, second = table.synthetic("a.test"), table.synthetic("b.test")
    assert first != second
    assert is_synthetic(first)
    assert table.synthetic("a.test") == first
    assert table.names(first) == ("a.test",)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "NAMES", 3)
    table = NameTable()
    addresses = [table.synthetic(f"{each}.test") for each in range(5)]
    assert [table.names(each) for each in addresses] == [(), (), ("2.test",), ("3.test",), ("4.test",)]
    table.learn("2.test", [f"192.0.2.{each}" for each in range(100)])
    assert table.names("192.0.2.5") == ()
    assert table.names("192.0.2.99") == ("2.test",)


def test_addresses_are_used_again_when_all_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "NAMES", 2)
    monkeypatch.setattr(names, "SYNTHETIC", names.IPv4Network("198.18.0.0/29"))
    table = NameTable()
    given = [table.synthetic(f"{each}.test") for each in range(20)]
    assert len(set(given)) == 6
    assert table.names(given[-1]) == ("19.test",)
    assert table.names(given[-2]) == ("18.test",)


def test_it_goes_with_a_checkpoint() -> None:
    table = NameTable()
    table.learn("a.test", ["192.0.2.1"])
    known = table.synthetic("b.test")
    again = NameTable.from_data(json.loads(json.dumps(table.to_data())))
    assert again.names("192.0.2.1") == ("a.test",)
    assert again.synthetic("b.test") == known
    assert again.synthetic("c.test") not in ("192.0.2.1", known)
    assert again.to_data()["names"][:1] == table.to_data()["names"][:1]


@pytest.mark.parametrize(
    "data",
    [
        {"next": 0},
        {"next": 10**9},
        {"names": 5},
        {"names": [["a.test"]]},
        {"names": [["A test", []]]},
        {"names": [["a.test", ["192.0.2.300"]]]},
        {"names": [[5, []]]},
        {"names": [["a.test", [7]]]},
        {"format": 2},
    ],
)
def test_a_spoilt_table_is_refused(data: dict[str, Any]) -> None:
    good = NameTable().to_data()
    NameTable.from_data(good)
    with pytest.raises(ValueError, match="table of names"):
        NameTable.from_data({**good, **data})
    for key in good:
        with pytest.raises(ValueError, match="table of names"):
            NameTable.from_data({name: value for name, value in good.items() if name != key})
