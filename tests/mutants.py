"""Tests of the tests: Capsem, broken on purpose in one place, and the tests that must notice.

    python tests/mutants.py [NAME ...]        `make mutants` runs all

Each mutant is one exact replacement of text in a copy of the tree. Its tests have to fail there, having passed in a copy
that nobody broke. An anchor that is gone is an error and no reason to skip: then the mutant is to be written anew, for
what it stood for is still worth a test. `tests/unit/test_mutants.py` looks after that in every run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FAILED = 1  # pytest's exit status when tests have failed, and nothing else was wrong
LIMIT = 900  # seconds for one mutant's tests


class Mutant(NamedTuple):
    """In `file`, below src/capsem, `old` becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


COMMIT = """        self.enter(draft)
        self.publish(draft, self.stage(draft, checkpoint))
"""
MANIFEST_FIRST = """        draft.files.manifest.write_bytes(checkpoint.to_json())
        self.enter(draft)
        self.publish(draft, self.stage(draft, checkpoint))
"""
RECORD_CRASH = "tests/crash/test_checkpoints_crash.py::test_a_record_that_a_cut_left_is_the_old_or_the_new"
SAVE_CRASH = "tests/crash/test_save_crash.py::test_a_suspend_with_all_its_parts_at_once"
COMMIT_CRASH = "tests/crash/test_checkpoints_crash.py::test_a_commit"

MUTANTS = (
    Mutant(
        "gate off",
        "service/gate.py",
        "self._off = path is None and not overlap",
        "self._off = True",
        "tests/contract/test_gate.py::test_alone_is_alone_and_together_is_together",
    ),
    Mutant(
        "gate only within one service",
        "service/gate.py",
        "self._host = HostLock(path) if path is not None and not overlap else None",
        "self._host = None",
        "tests/contract/test_gate.py::test_who_would_go_alone_is_not_starved_by_those_who_go_together",
    ),
    Mutant(
        "locks of the host that exclude nobody",
        "store/gate.py",
        "await wait_for_lock(path, shared=shared)",
        "await wait_for_lock(path, shared=True)",
        "tests/contract/test_hazard.py::test_with_the_gate_nothing_is_ever_lost",
    ),
    Mutant(
        "nobody waits for the supervisor of a service that was killed",
        "store/gate.py",
        "(await self._poll(self._work, shared=shared)).release()",
        "pass",
        "tests/contract/test_gate.py::test_who_is_at_work_for_a_service_that_died_keeps_others_out",
    ),
    Mutant("manifest before data", "store/checkpoints.py", COMMIT, MANIFEST_FIRST, COMMIT_CRASH),
    Mutant(
        "missing fsync of a file",
        "store/durable.py",
        "                if lasting:\n                    os.fsync(fd)\n",
        "",
        RECORD_CRASH,
    ),
    Mutant(
        "rename without directory fsync",
        "store/durable.py",
        "        if sync:\n            sync_directory(self._path.parent)\n",
        "",
        COMMIT_CRASH,
    ),
    Mutant(
        "memory not synced",
        "store/ram.py",
        "        self.sync()\n        self.sync_sums()\n",
        "        self.sync_sums()\n",
        COMMIT_CRASH,
    ),
    Mutant(
        "memory of a suspend not synced",
        "supervisor/saving.py",
        "                    prepared.writer.sync,\n",
        "",
        SAVE_CRASH,
    ),
    Mutant(
        "devices of a suspend not synced",
        "supervisor/saving.py",
        "                    functools.partial(durable.sync_file, files.devices),\n",
        "",
        SAVE_CRASH,
    ),
    Mutant(
        "frozen layer not synced",
        "supervisor/saving.py",
        "(frozen, order.layer) if order.go_on else (frozen,)",
        "(frozen, order.layer) if order.go_on else ()",
        SAVE_CRASH,
    ),
    Mutant(
        "manifest there while its parts are made durable",
        "supervisor/saving.py",
        "                alongside(checkpoint)\n",
        "                alongside(checkpoint)\n                manifest.place()\n",
        SAVE_CRASH,
    ),
    Mutant(
        "layers swept beside who is about to name one",
        "service/fleet.py",
        "lock = await take_naming(self.layout, shared=False)",
        "lock = await take_naming(self.layout, shared=True)",
        "tests/contract/test_naming.py::test_a_sweep_waits_for_who_is_about_to_name_a_layer",
    ),
    Mutant(
        "layer named that was swept",
        "store/naming.py",
        "        require(layout, *handed)\n",
        "",
        "tests/contract/test_naming.py::test_a_layer_that_was_swept_is_not_named",
    ),
    Mutant(
        "layer merged that is written to",
        "model/vm.py",
        "-2 if self.freezing or self.state == State.SUSPENDING else -1",
        "-1",
        "tests/contract/test_flattening.py::test_what_a_machine_may_still_write_to_is_not_merged",
    ),
    Mutant(
        "merged layer not synced",
        "hypervisor/qemu/merge.py",
        "_write_all(fd, start, 0)\n                os.fsync(fd)\n",
        "_write_all(fd, start, 0)\n",
        "tests/crash/test_service_crash.py::test_a_merge_of_layers_changes_nothing_that_anybody_can_read",
    ),
    Mutant(
        "removal not made durable",
        "service/members.py",
        "            durable.sync_directory(session.path)\n",
        "            pass\n",
        "tests/crash/test_service_crash.py::test_a_delete",
    ),
    Mutant(
        "guest file acknowledged before it is durable",
        "guest/writer.py",
        "        os.fsync(self._fd)\n",
        "",
        "tests/unit/test_guest_files.py",
    ),
    Mutant(
        "suspend acknowledged before the machine's exit",
        "service/checkpoints.py",
        "                    if not await vm.ended(EXIT_LIMIT):\n                        await vm.stop(Stop(kill=True))\n",
        "                    pass\n",
        "tests/contract/test_hazard.py::test_with_the_gate_nothing_is_ever_lost tests/contract/test_driver_sim.py",
    ),
    Mutant(
        "a flush that was given up holds the guest's commands later",
        "guest/agent.py",
        "elif limit is None or self._mux.request(stream) is None:",
        "elif limit is None:",
        "tests/contract/test_agent_epochs.py::test_a_flush_that_was_given_up_holds_nothing_later",
    ),
    Mutant(
        "no epoch check",
        "wire/handshake.py",
        "if message.epoch == self._offered:",
        "if message.epoch:",
        "tests/unit/test_wire_handshake.py tests/unit/test_control_guest.py",
    ),
    Mutant(
        "retry without dedup",
        "guest/jobs.py",
        "if job in self._started:",
        "if job in ():",
        "tests/contract/test_agent_exec.py::test_a_job_is_never_started_twice",
    ),
    Mutant(
        "health check ignored",
        "control/guest.py",
        "if self._restored and self.boot_ready.problems:",
        "if self._restored and not self.boot_ready:",
        "tests/unit/test_control_guest.py",
    ),
    Mutant(
        "mark not compared",
        "guest/health.py",
        "if not mark == self._mark == found:",
        "if not found:",
        "tests/unit/test_guest_health.py",
    ),
    Mutant(
        "layer collected while a checkpoint names it",
        "service/holdings.py",
        "        used |= {layer for checkpoint in self.checkpoints.all() for layer in checkpoint.layer_ids}\n",
        "",
        "tests/contract/test_collect.py",
    ),
    Mutant(
        "written to a layer that a checkpoint holds",
        "service/create.py",
        " or self.fleet.is_frozen(vm.record.layers[-1])",
        "",
        "tests/contract/test_collect.py",
    ),
    Mutant(
        "page range off by one",
        "hypervisor/qemu/pagemap.py",
        "(found.end() - found.start()) * PAGE",
        "(found.end() - found.start() - 1) * PAGE",
        "tests/unit/test_qemu_memory.py",
    ),
    Mutant(
        "page region off by one",
        "hypervisor/qemu/pagemap.py",
        "regions[number + 1] - regions[number])",
        "regions[number + 1] - regions[number] - PAGE)",
        "tests/unit/test_qemu_memory.py",
    ),
    Mutant(
        "digest of a part not compared",
        "store/checkpoints.py",
        "if part is not None and describe(path) != part:",
        "if part is not None and not path.exists():",
        "tests/unit/test_store_checkpoints.py",
    ),
    Mutant(
        "memory of another VM accepted",
        "store/checkpoints.py",
        "if identity != ram.RamIdentity(checkpoint.vm_id, checkpoint.id, checkpoint.memory.size):",
        "if identity.size != checkpoint.memory.size:",
        "tests/unit/test_store_checkpoints.py",
    ),
    Mutant(
        "draft swept while somebody works on it",
        "store/checkpoints.py",
        "                lock = try_lock(files.draft)\n            except OSError:",
        '                lock = try_lock(files.draft.with_name("sweep"))\n            except OSError:',
        "tests/unit/test_store_checkpoints.py",
    ),
    Mutant(
        "ledger written on a full disk",
        "ledger/writer.py",
        "if self._connection is None or not room:",
        "if self._connection is None:",
        "tests/unit/test_ledger_writer.py::test_a_disk_without_room_loses_events_and_no_process",
    ),
    Mutant(
        "layer of a failed save forgotten",
        "supervisor/changes.py",
        "if not added and layer.path.exists():",
        "if added and layer.path.exists():",
        "tests/contract/test_sim_faults.py::test_a_save_that_cannot_say_that_it_failed_leaves_no_layer_in_the_end",
    ),
    Mutant(
        "import without its digests",
        "store/archive.py",
        'if kind in b"EZ" and payload != before:',
        'if kind in b"EZ" and len(payload) != len(before):',
        "tests/contract/test_transfer.py",
    ),
    Mutant(
        "a body with a length and chunks",
        "egress/http1.py",
        "        if lengths:\n            raise",
        "        if False:\n            raise",
        "tests/property/test_egress_http1.py::test_what_can_be_read_in_two_ways_is_refused",
    ),
    Mutant(
        "a head in one read is not measured",
        "egress/http1.py",
        "if size > MAX_HEAD:",
        "if end < 0 and size > MAX_HEAD:",
        "tests/property/test_egress_http1.py::test_a_head_that_came_in_one_read_is_measured_too",
    ),
    Mutant(
        "two names of a host",
        "egress/http1.py",
        "if len(hosts_named) != 1:",
        "if not hosts_named:",
        "tests/property/test_egress_http1.py::test_what_can_be_read_in_two_ways_is_refused",
    ),
    Mutant(
        "chunks longer than they say",
        "egress/bodies.py",
        'if not b"\\r\\n".startswith(end):',
        "if False:",
        "tests/property/test_egress_http1.py::test_chunks_that_can_be_read_in_two_ways_are_refused",
    ),
    Mutant(
        "fronting by Host",
        "egress/requests.py",
        "if fixed is not None and named != fixed:",
        "if False:",
        "tests/unit/test_egress_core.py::test_a_host_other_than_the_one_of_tls_is_misdirected",
    ),
    Mutant(
        "fronting by a tunnel",
        "egress/connected.py",
        "        if arrival.host is not None and hello.sni != arrival.host:\n            mismatch",
        "        if False:\n            mismatch",
        "tests/unit/test_egress_hostile.py::test_a_tunnel_for_one_name_is_not_used_for_another",
    ),
    Mutant(
        "addresses that nobody checks",
        "egress/admit.py",
        "            admitted = await self.check(subject, admitted, address)",
        "            pass",
        "tests/unit/test_egress_hostile.py::test_an_address_below_the_floor_is_not_dialled_whatever_its_name",
    ),
    Mutant(
        "only the first address is checked",
        "egress/admit.py",
        "for address in found:",
        "for address in found[:1]:",
        "tests/unit/test_egress_hostile.py::test_an_address_below_the_floor_is_not_dialled_whatever_its_name",
    ),
    Mutant(
        "addresses inside of addresses",
        "egress/floor.py",
        "    inner = wrapped(address)\n    if inner is not None:",
        "    inner = wrapped(address)\n    if False:",
        "tests/unit/test_egress_floor.py::test_everything_else_is_below_it",
    ),
    Mutant(
        "a name is resolved before it is judged",
        "egress/requests.py",
        "            admitted = await self._door.admission.admit(subject)\n",
        "            await self._door.admission._resolver.addresses(subject.host or '')\n"
        "            admitted = await self._door.admission.admit(subject)\n",
        "tests/unit/test_egress_core.py::test_a_denied_request_gets_a_page_that_says_why",
    ),
    Mutant(
        "a name that is not allowed is looked up",
        "egress/lookups.py",
        "if verdict.action is not Action.ALLOW:",
        "if False:",
        "tests/unit/test_egress_lookups.py::test_what_is_not_allowed_never_leaves_the_host",
    ),
    Mutant(
        "paths as they were sent",
        "egress/requests.py",
        'if b"/." in head.target or b"%2e" in head.target.lower():',
        "if False:",
        "tests/unit/test_egress_traffic.py::test_what_is_judged_is_what_is_asked_for",
    ),
    Mutant(
        "an answer to no question",
        "egress/pool.py",
        "if now - upstream.since < _IDLE and upstream.quiet():",
        "if True:",
        "tests/unit/test_egress_traffic.py::test_what_an_origin_says_unasked_is_nobodys_answer",
    ),
    Mutant(
        "asked about a name is asked about an address",
        "egress/admit.py",
        "if verdict.action is Action.ASK and admitted.asked:",
        "if verdict.action is Action.ASK:",
        "tests/unit/test_egress_traffic.py::test_what_an_address_makes_a_question_is_asked_too",
    ),
    Mutant(
        "a hidden name passes through",
        "egress/connected.py",
        "if hello.ech and not admitted.verdict.ech:",
        "if False:",
        "tests/unit/test_egress_hostile.py::test_a_hidden_name_does_not_pass_through",
    ),
    Mutant(
        "no bound for streams",
        "egress/core.py",
        "if self._closed or len(self._serving) >= STREAMS:",
        "if self._closed:",
        "tests/unit/test_egress_hostile.py::test_six_hundred_streams_at_once",
    ),
    Mutant(
        "half a hello is waited for",
        "egress/connected.py",
        "async with asyncio.timeout_at(limit):\n                reader",
        "async with asyncio.timeout_at(None):\n                reader",
        "tests/unit/test_egress_hostile.py::test_half_a_hello_is_not_waited_for",
    ),
    Mutant(
        "a spliced connection without its rule",
        "egress/core.py",
        "if not allowed(admission.judge):",
        "if False:",
        "tests/unit/test_egress_hostile.py::test_a_download_survives_a_reload_and_spliced_bytes_do_not_without_their_rule",
    ),
    Mutant(
        "an answer waits for the whole request",
        "egress/exchange.py",
        "return None if self._body.whole() else asyncio.create_task(self._pump(upstream))",
        "if not self._body.whole():\n            await self._pump(upstream)\n        return None",
        "tests/unit/test_egress_traffic.py::test_an_early_answer_arrives_while_the_body_is_still_sent",
    ),
    Mutant(
        "requests taken back without end",
        "egress/http2.py",
        "if self._resets > RESETS + 2 * self._done:",
        "if False:",
        "tests/unit/test_egress_http2.py::test_rapid_resets_end_the_connection",
    ),
    Mutant(
        "GOAWAY ends everything",
        "egress/h2side.py",
        "if self._data[at + 3] == _GOAWAY:",
        "if False:",
        "tests/unit/test_egress_http2.py::test_an_origin_that_leaves_lets_streams_end",
    ),
    Mutant(
        "streams of HTTP/2 that nobody judges by address",
        "egress/http2.py",
        "        if split[0] != expected:",
        "        if False:",
        "tests/unit/test_egress_http2.py::test_each_stream_is_judged",
    ),
)


def apply(mutant: Mutant, source: Path) -> None:
    """Break the tree whose package is `source`. Raises LookupError when the anchor is not there exactly once."""
    path = source / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise LookupError(f"{mutant.name}: its anchor is {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


def tested(mutant: Mutant | None, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status, and what it said, in a copy of the tree that is broken in this way."""
    with tempfile.TemporaryDirectory(prefix="capsem-mutant-") as text:
        root = Path(text)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, root)
        if mutant is not None:
            apply(mutant, root / "src/capsem")
        env = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        found = subprocess.run(
            [sys.executable, "-c", "import capsem; print(capsem.__file__)"],
            cwd=root, env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert Path(found.stdout.strip()).is_relative_to(root), "the tests would see the tree that nobody broke"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--tb=short",
            "-m",
            "not vm",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=LIMIT)
        return done.returncode, done.stdout


def caught(mutant: Mutant) -> str:
    """The test that failed, or "" when none did, or the tests did not run."""
    status, said = tested(mutant, mutant.tests.split())
    failed = [line.split()[1] for line in said.splitlines() if line.startswith("FAILED ")]
    return failed[0] if status == FAILED and failed else ""


def main(names: list[str]) -> int:
    """Run the mutants of these names, or all; 0 when each was caught."""
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if unknown := set(names) - {mutant.name for mutant in mutants}:
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
    status, said = tested(None, tests)
    if status != 0:
        print(f"the tests fail in a tree that nobody broke:\n{said[-4000:]}", file=sys.stderr)
        return 2
    survived = 0
    for mutant in mutants:
        test = caught(mutant)
        survived += not test
        print(f"{'caught' if test else 'SURVIVED':9} {mutant.name:48} {test}", flush=True)
    print(f"{len(mutants) - survived} of {len(mutants)} mutants caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
