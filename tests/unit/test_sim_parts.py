"""The simulated hypervisor's parts: its script, its plan, its host, its layers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capsem.hypervisor.driver import Layer
from capsem.hypervisor.sim import shell, volume
from capsem.hypervisor.sim.host import BOOT, RESTORE, SAVE, TEARDOWN, SimHost
from capsem.hypervisor.sim.memory import Job, Memory
from capsem.hypervisor.sim.plan import FAULTS, RESTORE_FAILS, SAVE_FAILS, Dice, Plan
from capsem.hypervisor.sim.volume import Disk, File
from capsem.model.errors import Corrupt, InvalidInput


class TestShell:
    def test_a_line_becomes_steps(self) -> None:
        steps = shell.parse("echo 'a b' $WHO > f && sync || false; exit 3", {"WHO": "me"})
        assert [step["argv"] for step in steps] == [["echo", "a b", "me"], ["sync"], ["false"], ["exit", "3"]]
        assert [step["when"] for step in steps] == ["always", "success", "failure", "always"]
        assert steps[0]["to"] == "f"
        assert not steps[0]["append"]

    @pytest.mark.parametrize("text", ["echo 'a", "echo a | cat", "&& echo", "echo >", "cat < f"])
    def test_what_it_cannot_do_it_says(self, text: str) -> None:
        with pytest.raises(shell.BadScript, match="bash: "):
            shell.parse(text, {})


class TestPlan:
    def test_one_line_says_it_all(self) -> None:
        plan = Plan.parse("tolerant seed=7 save-fails@2 lying-fsync=0.5 faults=0.01 host=/h")
        assert plan.tolerant
        assert plan.seed == 7
        assert plan.nth == {SAVE_FAILS: 2}
        assert plan.chances == {**dict.fromkeys(FAULTS, 0.01), "lying-fsync": 0.5}
        assert plan.host == Path("/h")

    @pytest.mark.parametrize("word", ["safe-fails@1", "save-fails@0", "save-fails=2", "faults", "seed=x"])
    def test_nonsense_is_refused_and_named(self, word: str) -> None:
        with pytest.raises(InvalidInput, match=word):
            Plan.parse(word)

    def test_a_seed_is_played_again_and_an_nth_strikes_once_on_a_host(self, tmp_path: Path) -> None:
        host = SimHost(tmp_path, hazard=True)

        def throws(seed: int) -> list[bool]:
            dice = Dice(Plan(seed=seed, chances={SAVE_FAILS: 0.5}), host, "box")
            return [dice.strikes(SAVE_FAILS) for _ in range(64)]

        assert throws(1) == throws(1)
        assert throws(1) != throws(2)
        second = Plan(nth={RESTORE_FAILS: 2})
        dice = [Dice(second, host, name) for name in ("a", "b", "c")]
        assert [each.strikes(RESTORE_FAILS) for each in dice] == [False, True, False]


class TestHost:
    @pytest.mark.parametrize(
        ("first", "second", "harm"),
        [
            (SAVE, SAVE, True),
            (SAVE, BOOT, True),
            (RESTORE, SAVE, True),
            (TEARDOWN, RESTORE, True),
            (BOOT, BOOT, False),
            (BOOT, TEARDOWN, False),
        ],
    )
    def test_what_overlaps_is_struck(self, tmp_path: Path, first: str, second: str, *, harm: bool) -> None:
        one, other = SimHost(tmp_path, hazard=True), SimHost(tmp_path, hazard=True)  # as two processes have it
        begun = one.begin("a", first)
        other.begin("b", second).end()
        begun.end()
        assert [one.is_struck("a"), one.is_struck("b")] == [harm, harm]

    def test_what_follows_is_not(self, tmp_path: Path) -> None:
        host = SimHost(tmp_path, hazard=True)
        host.begin("a", SAVE).end()
        host.begin("b", RESTORE).end()
        assert not host.is_struck("a")
        assert not host.is_struck("b")

    def test_an_operation_of_a_process_that_was_killed_is_over(self, tmp_path: Path) -> None:
        host = SimHost(tmp_path, hazard=True)
        (tmp_path / "dead.save").touch()
        host.begin("b", RESTORE).end()
        assert not host.is_struck("b")
        assert not (tmp_path / "dead.save").exists()

    def test_a_host_without_the_hazard_does_not_mind(self, tmp_path: Path) -> None:
        host = SimHost(tmp_path, hazard=False)
        begun = host.begin("a", SAVE)
        host.begin("b", RESTORE).end()
        begun.end()
        assert not host.is_struck("b")


class TestVolume:
    def layer(self, root: Path, name: str) -> Layer:
        volume.create(root / name, size_mb=16, vm_id="box", layer_id="1" * 32)
        return Layer(root / name, "qcow2")

    def test_the_topmost_layer_decides_and_a_frozen_one_does_not_change(self, tmp_path: Path) -> None:
        base, top = self.layer(tmp_path, "base"), self.layer(tmp_path, "top")
        disk = Disk((base,))
        disk.write({"/a": File(b"1"), "/b": File(b"1")})
        disk.go_on(top.path)
        before = base.path.read_bytes()
        disk.write({"/a": File(b"2"), "/b": None})
        disk.close()
        assert base.path.read_bytes() == before
        again = Disk((base, top))
        assert again.files == {"/a": File(b"2"), "/b": None}
        again.close()

    def test_a_record_that_was_cut_off_counts_for_nothing_and_is_written_over(self, tmp_path: Path) -> None:
        layer = self.layer(tmp_path, "top")
        disk = Disk((layer,))
        disk.write({"/a": File(b"1")})
        whole = layer.path.stat().st_size
        disk.write({"/a": File(b"2")})
        disk.close()
        os.truncate(layer.path, layer.path.stat().st_size - 1)
        disk = Disk((layer,))
        assert disk.files == {"/a": File(b"1")}
        assert layer.path.stat().st_size == whole
        disk.write({"/a": File(b"3")})
        disk.close()
        assert volume.read(layer.path)[0] == {"/a": File(b"3")}

    def test_what_a_liar_took_comes_with_the_next_honest_write_or_never(self, tmp_path: Path) -> None:
        layer = self.layer(tmp_path, "top")
        disk = Disk((layer,))
        disk.write({"/a": File(b"1")}, lying=True)
        assert disk.files == {"/a": File(b"1")}
        assert volume.read(layer.path)[0] == {}
        disk.write({"/b": File(b"1")})
        disk.write({"/c": File(b"1")}, lying=True)
        disk.close()
        assert volume.read(layer.path)[0] == {"/a": File(b"1"), "/b": File(b"1")}

    @pytest.mark.parametrize("data", [b"", b"QFI\xfb", b"{}", b"[1]", b"\0" * 5000])
    def test_another_file_is_no_layer(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(Corrupt, match="not a layer"):
            volume.read(tmp_path / "x")


def test_memory_comes_back_as_it_was(tmp_path: Path) -> None:
    job = Job("1", shell.parse("sleep 9; echo x > f", {}), wakes=4.5)
    memory = Memory("boot", uptime=2.0, dirty={"/root/f": File(b"\0\xff"), "/root/g": None}, jobs={"1": job})
    (tmp_path / "ram").write_bytes(memory.to_pages() + bytes(4096))
    assert Memory.from_ram(tmp_path / "ram") == memory
    (tmp_path / "ram").write_bytes(bytes(8192))
    with pytest.raises(Corrupt, match="not the memory"):
        Memory.from_ram(tmp_path / "ram")
