"""Settings put into the user's file: by place, with everything else left as it is."""

from __future__ import annotations

import tomllib

import pytest

from capsem.model.errors import InvalidInput
from capsem.service.settings_file import changed


def test_into_an_empty_file() -> None:
    text = changed("", {"vm.resources.ram_gb": 2.5, "vm.on_service_stop": "keep"})
    assert tomllib.loads(text) == {"vm": {"resources": {"ram_gb": 2.5}, "on_service_stop": "keep"}}


def test_what_else_stands_there_stays() -> None:
    before = "# mine\n[vm.resources]\n# little\nram_gb = 1  # GiB\ncpu_count = 2\n\n[other]\nram_gb = 7\n"
    after = changed(before, {"vm.resources.ram_gb": 3.0})
    assert after == before.replace("ram_gb = 1  # GiB", "ram_gb = 3.0")
    assert changed(after, {"vm.resources.max_concurrent_vms": 4}).startswith(
        "# mine\n[vm.resources]\nmax_concurrent_vms = 4\n"
    )


@pytest.mark.parametrize("text", ["vm.resources.ram_gb = 1\n", "[vm]\nresources = {ram_gb = 1}\n"])
def test_a_file_that_says_it_otherwise_is_left_to_its_owner(text: str) -> None:
    with pytest.raises((InvalidInput, tomllib.TOMLDecodeError)):
        changed(text, {"vm.resources.ram_gb": 2.0})
