"""Secrets in the settings: what may be said of one, what is wrong, and files that are changed in place."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from capsem.egress.grants import Places
from capsem.model.errors import InvalidInput
from capsem.service.secret_settings import Source, from_table, load, read
from capsem.service.settings_file import with_table, without_table

LEAST: dict[str, Any] = {"name": "key", "source": "env:KEY", "hosts": ["api.test"]}


def test_what_is_not_said_is_as_usual() -> None:
    secret = from_table(LEAST, "f")
    assert (secret.name, secret.source, secret.hosts, secret.env) == ("key", Source("env", "KEY"), ("api.test",), None)
    assert (secret.places, secret.prefix, secret.ttl, secret.where) == (Places(), "", 60, "f")
    assert secret.to_table() == LEAST


def test_everything_that_may_be_said() -> None:
    table = {
        "name": "my-key",
        "source": "command:gh auth 'token x'",
        "hosts": ["API.Test.", "*.Lab.test"],
        "env": "GH_TOKEN",
        "header": ["X-Api-Key"],
        "basic": False,
        "query": True,
        "body": True,
        "prefix": "gho_",
        "ttl": 5,
    }
    secret = from_table(table, "f")
    assert secret.hosts == ("api.test", "*.lab.test")
    assert secret.places == Places(("x-api-key",), basic=False, query=True, body=True)
    assert (secret.prefix, secret.ttl, str(secret.source)) == ("gho_", 5, "command:gh auth 'token x'")
    assert secret.source.shown == "command:gh"
    assert from_table(secret.to_table(), "f") == secret
    assert secret.grant(("p",)).placeholders == ("p",)


def test_a_placeholder_begins_as_programs_expect_it() -> None:
    assert from_table(LEAST | {"env": "ANTHROPIC_API_KEY"}, "f").prefix == "sk-ant-api03-"
    assert from_table(LEAST | {"env": "ANTHROPIC_API_KEY", "prefix": ""}, "f").prefix == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "Key"}, "cannot be a secret's name"),
        ({"name": None}, "cannot be a secret's name"),
        ({"source": None}, "source: env:NAME"),
        ({"source": "vault:x"}, "source: env:NAME"),
        ({"source": "env: "}, "source: env:NAME"),
        ({"source": "keyring:service"}, "keyring:SERVICE/USER"),
        ({"source": "file:relative"}, "absolute path"),
        ({"source": "command:echo 'open"}, "No closing quotation"),
        ({"hosts": []}, "hosts: where it may go"),
        ({"hosts": "api.test"}, "hosts: where it may go"),
        ({"hosts": ["*"]}, "may go anywhere is none"),
        ({"hosts": ["https://api.test"]}, "without scheme"),
        ({"hosts": ["192.0.2.1"]}, "is an address"),
        ({"env": "LD_PRELOAD"}, "cannot be a variable"),
        ({"env": "A=B"}, "cannot be a variable"),
        ({"header": []}, "header:"),
        ({"header": ["Host"]}, "can hold no secret"),
        ({"header": ["a b"]}, "can hold no secret"),
        ({"basic": "yes"}, "basic: true or false"),
        ({"header": False, "basic": False}, "may stand nowhere"),
        ({"prefix": "x" * 33}, "prefix"),
        ({"ttl": 61}, "ttl"),
        ({"ttl": True}, "ttl"),
        ({"value": "oops"}, "there is no key value"),
    ],
)
def test_what_is_wrong_is_told(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as raised:
        from_table(LEAST | change, "/settings.toml")
    assert str(raised.value).startswith("/settings.toml: ")


def test_the_company_goes_first(tmp_path: Path) -> None:
    user, corporate = tmp_path / "config.toml", tmp_path / "corp.toml"
    entry = '[[secret]]\nname = "{}"\nsource = "env:{}"\nhosts = ["api.test"]\n'
    user.write_text(entry.format("a", "MINE") + entry.format("b", "MINE") + "[vm.resources]\nram_gb = 1\n")
    environ = {"CAPSEM_HOME": str(tmp_path)}
    assert sorted(load(environ)) == ["a", "b"]
    corporate.write_text(entry.format("a", "THEIRS"))
    found = load(environ | {"CAPSEM_CORP_CONFIG": str(corporate)})
    assert [(each.source.reference, each.where) for each in found.values()] == [
        ("THEIRS", str(corporate)),
        ("MINE", str(user)),
    ]
    corporate.write_text("[[secret]")
    with pytest.raises(InvalidInput, match=r"corp\.toml cannot be read"):
        load(environ | {"CAPSEM_CORP_CONFIG": str(corporate)})


@pytest.mark.parametrize("text", ["secret = 3", "secret = [3]", "[secret]\nname = 'a'"])
def test_what_is_no_array_of_tables(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"write \[\[secret\]\]"):
        read(text, "f")


def test_two_of_one_name() -> None:
    entry = '[[secret]]\nname = "a"\nsource = "env:A"\nhosts = ["api.test"]\n'
    with pytest.raises(InvalidInput, match="two secrets are called a"):
        read(entry * 2, "f")


FILE = """# mine
[vm.resources]
ram_gb = 2 # enough

[[secret]]
# the first
name = "one"
source = "env:ONE"
hosts = [
    "a.test",
]

# about the second
[[ secret ]] # so
name = "two"
source = "env:TWO"
hosts = ["b.test"]

[network]
preset = "high"
"""


def test_a_secret_is_put_into_the_file_and_taken_out_and_all_else_stays() -> None:
    table = {"name": "one", "source": "env:'\"\\", "hosts": ["c.test"], "query": True}
    text = with_table(FILE, "secret", table)
    assert tomllib.loads(text)["secret"] == [tomllib.loads(FILE)["secret"][1], table]
    for kept in ("# mine", "# enough", "# about the second", "[[ secret ]] # so", 'preset = "high"'):
        assert kept in text
    assert without_table(text, "secret", "one") == without_table(FILE, "secret", "one")
    both = without_table(without_table(FILE, "secret", "one"), "secret", "two")
    assert "secret" not in tomllib.loads(both)
    assert tomllib.loads(both)["network"] == {"preset": "high"}
    assert without_table(FILE, "secret", "three") == FILE
    assert tomllib.loads(with_table("", "secret", table)) == {"secret": [table]}


def test_a_secret_that_stands_there_in_a_way_of_its_own() -> None:
    text = 'secret = [{ name = "a", source = "env:A", hosts = ["a.test"] }]\n'
    assert list(read(text, "f")) == ["a"]
    with pytest.raises(InvalidInput, match="in a way of its own"):
        without_table(text, "secret", "a")
