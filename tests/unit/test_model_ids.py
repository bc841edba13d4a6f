"""Names and ids."""

import random

import pytest

from capsem.model.errors import InvalidInput
from capsem.model.ids import ADJECTIVES, NAME_LIMIT, NOUNS, check_name, check_object_id, generate_id


@pytest.mark.parametrize("name", ["a", "7", "box", "Box-2_x", "a" * NAME_LIMIT, "0-", "z_-_"])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a" * (NAME_LIMIT + 1),
        "../x",
        "a/b",
        ".",
        "..",
        ".hidden",
        "-leading",
        "_leading",
        "nul\0",
        "line\n",
        "sp ace",
        "dot.ted",
        "ümlaut",
        "a٣",  # a digit, but not an ASCII one
        "\ud800",
        "a" * 100_000,
    ],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_name(name)
    assert caught.value.hint
    assert len(str(caught.value)) < 1000


def test_object_ids() -> None:
    assert check_object_id("0123456789abcdef" * 2) == "0123456789abcdef" * 2
    for bad in ("", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 32 + "\n", "../" + "0" * 29):
        with pytest.raises(InvalidInput):
            check_object_id(bad)


def test_word_lists_make_good_names() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)
    for adjective in ADJECTIVES:
        check_name(f"{adjective}-{max(NOUNS, key=len)}-tmp")
    assert all(word.isascii() and word.islower() and "-" not in word for word in (*ADJECTIVES, *NOUNS))


def test_generated_ids_differ_in_their_first_word_while_words_last() -> None:
    choose = random.Random(1).choice
    taken: list[str] = []
    for _ in ADJECTIVES:
        name = generate_id(choose, taken)
        assert check_name(name) == name
        assert name.endswith("-tmp")
        taken.append(name)
    assert {name.split("-")[0] for name in taken} == set(ADJECTIVES)


def test_generated_ids_never_collide_when_first_words_are_used_up() -> None:
    choose = random.Random(2).choice
    taken: set[str] = set()
    for _ in range(10 * len(ADJECTIVES)):
        name = generate_id(choose, taken)
        assert name not in taken
        taken.add(name)


def test_the_last_free_id_is_found() -> None:
    every = {f"{adjective}-{noun}-tmp" for adjective in ADJECTIVES for noun in NOUNS}
    last = f"{ADJECTIVES[3]}-{NOUNS[5]}-tmp"
    assert generate_id(random.Random(3).choice, every - {last}) == last


def test_names_of_the_users_own_count_as_first_words() -> None:
    taken = [*ADJECTIVES[1:], f"{ADJECTIVES[0]}x"]
    name = generate_id(random.Random(4).choice, taken)
    assert name.split("-")[0] == ADJECTIVES[0]
