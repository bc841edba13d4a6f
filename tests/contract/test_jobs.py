"""The supervisor's jobs over a real agent: through epochs, and from one supervisor to the next as a checkpoint does it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest
from test_agent_reattach import begin_anew, numbers

from agent_bench import Bench
from capsem.model.errors import Interrupted, NotFound
from capsem.store.jobs import decode, encode
from capsem.supervisor.jobs import FINISHED_KEPT, Follower, Job, JobTable, saved_jobs
from capsem.supervisor.server import job_list
from capsem.wire.messages import STDERR, STDOUT, Exec, Exited, Reattach

Run = Callable[..., None]


class Reader:
    """Somebody who follows a job."""

    def __init__(self, job: Job, **offsets: int) -> None:
        self.content = {STDOUT: bytearray(), STDERR: bytearray()}
        self.follower = Follower({STDOUT: offsets.get("stdout", 0), STDERR: offsets.get("stderr", 0)})
        self.ending = asyncio.create_task(job.follow(self.follower, self._write, wait=True))

    async def _write(self, channel: int, data: bytes) -> None:
        self.content[channel] += data

    @property
    def stdout(self) -> bytes:
        return bytes(self.content[STDOUT])


def start(bench: Bench, table: JobTable, job_id: str, command: str) -> Job:
    job = Job(job_id, command)
    job.start(bench.guest, Exec(job=job_id, command=command))
    table.add(job)
    return job


async def become(bench: Bench, table: JobTable) -> JobTable:
    """What a suspend and a resume make of a supervisor's jobs: the guest goes on from the instant of the marks."""
    content = encode(saved_jobs(table.marks()))
    bench.guest.channel.drop_streams(Interrupted("the machine is gone"))
    for job in table:
        if job._task is not None:
            job._task.cancel()
    bench.guest._set_ready(False)
    again = JobTable()
    again.restore(decode(content, source="memory"), bench.guest)
    await begin_anew(bench)
    return again


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_job_goes_on_through_an_epoch_and_its_followers_notice_nothing(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        table = JobTable()
        job = start(bench, table, "mine", "seq 300000; echo done >&2; exit 5")
        reader = Reader(job)
        for size in (50_000, 400_000, 900_000):
            await until(lambda size=size: len(reader.stdout) > size)  # type: ignore[misc]
            await begin_anew(bench)
        assert job_list(table, 0.0).followed == ["mine"]
        ended = await reader.ending
        assert job_list(table, 0.0).followed == []
        assert (reader.stdout, bytes(reader.content[STDERR])) == (numbers(300_000), b"done\n")
        assert (ended.exit_code, ended.dropped, ended.running) == (5, 0, False)

    with_agent(scenario)


def test_a_job_of_an_agent_that_died_is_interrupted_and_not_run_again(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        job = start(bench, JobTable(), "mine", "echo x >> log; echo begun; sleep 100")
        reader = Reader(job)
        await until(lambda: reader.stdout == b"begun\n")
        await bench.restart()
        with pytest.raises(Interrupted, match="not known"):
            await reader.ending
        assert (bench.workspace / "log").read_bytes() == b"x\n"

    with_agent(scenario)


def test_an_ended_job_is_forgotten_by_the_guest_once_all_of_it_has_arrived(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        job = start(bench, JobTable(), "mine", "head -c 1000000 /dev/zero")
        await Reader(job).ending
        assert job._task is not None
        await job._task
        with pytest.raises(NotFound):
            await bench.ask(Reattach(job="mine"))
        assert job.outputs[STDOUT].end == 1_000_000

    with_agent(scenario)


def test_jobs_from_one_supervisor_to_the_next(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        table = JobTable()
        ended = start(bench, table, "ended", "echo early; exit 4")
        await Reader(ended).ending
        waiting = start(bench, table, "waiting", "echo one; read x < go; echo two; exit 6")
        await until(lambda: waiting.outputs[STDOUT].end == 4)
        flood = start(bench, table, "flood", "seq 1000000; exit 7")
        await until(lambda: flood.outputs[STDOUT].end > 300_000)
        table = await become(bench, table)
        assert [job.id for job in table] == ["ended", "waiting", "flood"]
        await until(lambda: table.get("flood").outputs[STDOUT].end > 900_000)
        table = await become(bench, table)
        await bench.run("echo > go")
        for name, content, code in (
            ("ended", b"early\n", 4),
            ("waiting", b"one\ntwo\n", 6),
            ("flood", numbers(1_000_000), 7),
        ):
            reader = Reader(table.get(name))
            assert ((await reader.ending).exit_code, reader.stdout) == (code, content), name
            assert reader.follower.dropped == 0

    with_agent(scenario)


def test_a_mark_is_of_its_instant(with_agent: Run) -> None:
    """What comes after it is another future's."""

    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        table = JobTable()
        job = start(bench, table, "mine", "echo one; read x < go; echo two")
        await until(lambda: job.outputs[STDOUT].end == 4)
        marks = table.marks()
        await bench.run("echo > go")
        await Reader(job).ending
        start(bench, table, "later", "true")
        (saved,) = saved_jobs(marks)
        assert (saved.id, saved.stdout.data, saved.ended) == ("mine", b"one\n", None)
        _first, second = saved_jobs(table.marks())
        assert second.id == "later"
        assert isinstance(_first.ended, Exited)

    with_agent(scenario)


def test_what_is_saved_is_bounded_and_the_newest(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        table = JobTable()
        for number in range(4):
            both = "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2"
            await Reader(start(bench, table, f"large-{number}", both)).ending
        jobs = saved_jobs(table.marks())
        sizes = [len(job.stdout.data) + len(job.stderr.data) for job in jobs]
        assert sizes == [(32 << 20) - 30_000_000, 10_000_000, 10_000_000, 10_000_000]
        assert all(job.stdout.end == job.stderr.end == 5_000_000 for job in jobs)
        for number in range(FINISHED_KEPT + 3):
            await Reader(start(bench, table, f"small-{number}", "true")).ending
        assert len(saved_jobs(table.marks())) <= FINISHED_KEPT + 1

    with_agent(scenario)


def test_a_cancelled_job_is_killed_even_while_it_has_no_stream(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        job = start(bench, JobTable(), "mine", "echo $$; sleep 100")
        reader = Reader(job)
        await until(lambda: reader.stdout.endswith(b"\n"))
        again = bench.next_epoch()
        bench.guest._begin_epoch()
        bench.guest._set_ready(False)
        bench.guest.channel.drop_streams(Interrupted("gone"))
        await asyncio.sleep(0)
        job.cancel()
        await again
        with pytest.raises(Interrupted):
            await reader.ending
        ran = await bench.run(
            f"for i in {{1..100}}; do kill -0 {int(reader.stdout)} || exit 0; sleep 0.05; done; exit 1"
        )
        assert ran.code == 0

    with_agent(scenario)
