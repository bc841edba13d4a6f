"""What the simulation's clients take to be possible: no less than what is, or seeds fail in which all is well."""

from __future__ import annotations

from capsem.simulation.history import Add, VmHistory


def test_an_add_is_acknowledged_once_and_counts_in_both() -> None:
    vm = VmHistory("v1")
    vm.begin("c", Add(1))
    assert vm.added("c", Add(1), 1, 1)
    vm.begin("c", Add(2))
    assert not vm.added("c", Add(2), 1, 1)
    assert not vm.added("c", Add(2), 2, 1)
    assert vm.added("c", Add(2), 2, 2)


def test_what_the_present_says_is_nothing_about_a_rollback_that_is_under_way() -> None:
    vm = VmHistory("v1")
    vm.begin("c", Add(1))
    there = vm.taken_to({})
    assert vm.added("c", Add(1), 1, 1)  # before it
    vm.begin("c", Add(2))
    assert vm.added("c", Add(2), 1, 1)  # after it, when who asked for it has not been answered yet
    vm.unwatch(there)
    vm.begin("c", Add(3))
    assert not vm.added("c", Add(3), 1, 2)
