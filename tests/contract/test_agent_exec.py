"""Commands: what the real agent runs, as the host sees it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_bench import Bench
from capsem.model.errors import AlreadyExists, CapsemError, Interrupted, InvalidInput
from capsem.wire.environment import BLOCKED_ENV
from capsem.wire.messages import STDERR, STDIN, STDOUT, Exited, Signal
from capsem.wire.streams import WINDOW

Run = Callable[..., None]


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


async def until_ended(pid: int) -> None:
    """The kernel tells when; a process that is no child of ours is waited for by its pidfd."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def until_state(pid: int, state: str) -> None:
    """Until the kernel shows a process in this state (proc_pid_stat(5)); it does not tell, so it is asked."""
    while Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != state:
        await asyncio.sleep(0.005)


async def after_lingering(bench: Bench, pid: int) -> None:
    """Until the agent has given up waiting for what a command's background processes write.

    `pid` is the command's. The agent learns of its end before it starts what is asked for after that; and what it is
    asked for takes longer than it lingers.
    """
    await until_ended(pid)
    await bench.run("sleep 0.2")


def test_output_error_output_and_exit_code_come_apart(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        ran = await bench.run("echo out; echo err >&2; exit 42")
        assert (ran.stdout, ran.stderr) == (b"out\n", b"err\n")
        assert (ran.exited.exit_code, ran.exited.signal, ran.exited.timed_out) == (42, None, False)
        assert ran.exited.duration > 0
        assert (await bench.run("true")).code == 0
        assert (await bench.run("no-such-command-at-all")).code == 127

    with_agent(scenario)


def test_output_is_passed_on_byte_for_byte(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        every = bytes(range(256))
        (bench.workspace / "every").write_bytes(every * 5)
        ran = await bench.run("cat every; cat every every >&2")
        assert ran.stdout == every * 5
        assert ran.stderr == every * 10
        ran = await bench.run("printf 'no newline'")
        assert ran.stdout == b"no newline"

    with_agent(scenario)


def test_output_comes_while_the_command_runs(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("echo first; read line; echo $line", stdin=True)
        assert await stream.read(STDOUT) == b"first\n"
        assert not stream.over
        await stream.write(STDIN, b"second\n")
        assert await stream.read(STDOUT) == b"second\n"
        assert (await bench.finish(stream)).code == 0

    with_agent(scenario)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_command_that_dies_of_a_signal(with_agent: Run, number: int) -> None:
    async def scenario(bench: Bench) -> None:
        ran = await bench.run(f"echo before; kill -{number} $$; echo after")
        assert ran.stdout == b"before\n"
        assert (ran.exited.exit_code, ran.exited.signal, ran.exited.timed_out) == (1, number, False)

    with_agent(scenario)


def test_the_host_can_signal_a_command_and_its_children(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("trap 'echo got it; exit 9' USR1; sleep 100 & echo $$; wait")
        assert int(await stream.read(STDOUT)) > 0
        stream.send(Signal(number=signal.SIGUSR1))
        ran = await bench.finish(stream)
        assert b"got it\n" in ran.stdout
        assert ran.code == 9
        stream = bench.start("sleep 100 & echo $!; wait")
        child = int(await stream.read(STDOUT))
        stream.send(Signal(number=signal.SIGKILL))
        assert (await bench.finish(stream)).exited.signal == signal.SIGKILL
        await until_ended(child)

    with_agent(scenario)


@pytest.mark.parametrize("number", [-1, 65, 1 << 31, (1 << 63) - 1])
def test_a_signal_that_does_not_exist_is_an_error_and_no_more(with_agent: Run, number: int) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("echo $$; sleep 100")
        pid = int(await stream.read(STDOUT))
        stream.send(Signal(number=number))
        with pytest.raises(CapsemError):
            await stream.result()
        await until_ended(pid)
        await bench.serves()

    with_agent(scenario)


def test_a_time_out_kills_the_whole_group(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        ran = await bench.run("sleep 100 & echo $! $$; trap '' TERM; wait; sleep 100", timeout=0.2)
        assert (ran.exited.exit_code, ran.exited.signal, ran.exited.timed_out) == (1, signal.SIGKILL, True)
        for pid in ran.stdout.split():
            await until_ended(int(pid))
        ran = await bench.run("exit 5", timeout=100)
        assert (ran.code, ran.exited.timed_out) == (5, False)

    with_agent(scenario)


@pytest.mark.parametrize("timeout", [3e6, 1e18, 1.7e308])
def test_a_time_out_of_any_length_is_one(with_agent: Run, timeout: float) -> None:
    """epoll takes at most 24 days."""

    async def scenario(bench: Bench) -> None:
        stream = bench.start("read line; echo $line", stdin=True, timeout=timeout)
        await bench.serves()
        assert (await bench.finish(stream, b"x\n")).stdout == b"x\n"

    with_agent(scenario)


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_no_time_at_all_is_over_at_once(with_agent: Run, timeout: float) -> None:
    async def scenario(bench: Bench) -> None:
        assert (await bench.run("sleep 100", timeout=timeout)).exited.timed_out

    with_agent(scenario)


# -- surroundings


def test_the_environment_is_the_contracts_and_nothing_of_the_agents(
    with_agent: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """interface.md 6.2."""
    monkeypatch.setenv("SECRET_OF_THE_AGENT", "x")

    async def scenario(bench: Bench) -> None:
        ran = await bench.run("env -0", env={"MINE": "of this command\n", "LANG": "xx"})
        env = dict(line.split("=", 1) for line in ran.stdout.decode().split("\0") if line)
        for of_bash in ("PWD", "SHLVL", "_"):
            env.pop(of_bash, None)
        assert env == {
            "HOME": "/root",
            "TERM": "xterm-256color",
            "PATH": "/opt/ai-clis/bin:/root/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "xx",
            "CAPSEM_VM_ID": "box",
            "CAPSEM_VM_NAME": "box",
            "OF_THE_VM": "ü",
            "MINE": "of this command\n",
        }
        assert (await bench.run("echo -n $MINE")).stdout == b""

    with_agent(scenario, {"OF_THE_VM": "ü", "LD_PRELOAD": "a host that forgets to check is not followed"})


@pytest.mark.parametrize("name", ["", "A=B", "A\0", *sorted(BLOCKED_ENV)[:3], "LD_PRELOAD", "BASH_ENV"])
def test_a_blocked_variable_is_refused_by_the_guest_too(with_agent: Run, name: str) -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(InvalidInput):
            await bench.run("true", env={name: "x"})
        with pytest.raises(InvalidInput):
            await bench.run("true", env={"A": "\0"})
        await bench.serves()

    with_agent(scenario)


def test_the_working_directory(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        assert (await bench.run("pwd")).stdout.decode().strip() == str(bench.workspace)
        assert (await bench.run("pwd", cwd="/usr")).stdout == b"/usr\n"
        assert (await bench.run("pwd")).stdout.decode().strip() == str(bench.workspace)
        (bench.workspace / "file").write_bytes(b"")
        for missing in ("/no/such/directory", str(bench.workspace / "file"), "a\0b", "\ud800", "x" * 5000):
            with pytest.raises(InvalidInput, match="working directory"):
                await bench.run("true", cwd=missing)
        await bench.serves()

    with_agent(scenario)


def test_a_refusal_always_fits_a_message(with_agent: Run) -> None:
    """What was asked for is quoted in the answer, however long it was."""

    async def scenario(bench: Bench) -> None:
        epoch = bench.guest.epoch
        long = "x" * ((1 << 20) - 100)
        await bench.run("true", job=long)
        for options in ({"cwd": long}, {"env": {long: "\0"}}, {"job": long}):
            with pytest.raises(CapsemError) as caught:
                await bench.run("true", **options)
            assert len(str(caught.value)) < 2000
        await bench.serves()
        assert bench.guest.epoch == epoch

    with_agent(scenario)


def test_commands_that_cannot_be_started_are_refused(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for command in ("echo \0", "echo \ud800"):
            with pytest.raises(CapsemError):
                await bench.run(command)
        with pytest.raises(InvalidInput, match="too long"):
            await bench.run("echo " + "x" * 200_000)
        with pytest.raises(InvalidInput, match="too long"):
            await bench.run("true", env={"A": "x" * 140_000})
        await bench.serves()

    with_agent(scenario)


def test_a_command_inherits_its_three_streams_and_nothing_else(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        running = [bench.start("read line", stdin=True) for _ in range(3)]
        ran = await bench.run("readlink /proc/self/fd/0; exec ls /proc/self/fd")
        assert ran.stdout.split()[0] == b"/dev/null"
        assert ran.stdout.split()[1:] == [b"0", b"1", b"2", b"3"]  # 3 is the directory that ls reads
        for stream in running:
            stream.reset()

    with_agent(scenario)


def test_each_command_leads_a_session_of_its_own_with_default_signals(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        ran = await bench.run("read -r _ _ _ _ group session _ < /proc/$$/stat; echo $$ $group $session")
        pid, group, session = ran.stdout.split()
        assert pid == group == session
        ran = await bench.run("grep -E 'Sig(Ign|Blk)' /proc/$$/status")
        # 32 and 33 are the C library's own: it takes care of them wherever it starts
        assert [int(mask, 16) & 0x7FFFFFFF for mask in ran.stdout.split()[1::2]] == [0, 0]

    with_agent(scenario)


def test_a_reader_that_goes_away_ends_the_writer(with_agent: Run) -> None:
    """SIGPIPE has its default action: Python ignores it, and must not hand that on."""

    async def scenario(bench: Bench) -> None:
        ran = await bench.run("yes | head -1; echo ${PIPESTATUS[0]}")
        assert ran.stdout == b"y\n141\n"
        assert ran.stderr == b""

    with_agent(scenario)


# -- standard input


def test_standard_input_of_any_size_passes_through(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        data = os.urandom(5 << 20)
        ran = await bench.run("cat", stdin=data)
        assert ran.stdout == data
        assert (await bench.run("cat", stdin=b"")).stdout == b""
        assert (await bench.run("wc -c", stdin=data)).stdout.strip() == str(len(data)).encode()

    with_agent(scenario)


def test_without_standard_input_there_is_an_empty_one(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        assert (await bench.run("cat; read x; echo $?")).stdout == b"1\n"

    with_agent(scenario)


@pytest.mark.parametrize("command", ["exit 7", "exec 0<&-; sleep 0.1; exit 7", "head -c 10 >/dev/null; exit 7"])
def test_a_command_that_does_not_read_its_input(with_agent: Run, command: str) -> None:
    async def scenario(bench: Bench) -> None:
        ran = await bench.run(command, stdin=bytes(5 << 20))
        assert (ran.code, ran.stdout) == (7, b"")
        await bench.serves()

    with_agent(scenario)


def test_a_command_that_reads_late_gets_everything(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("read first; echo $$; kill -STOP $$; cat | wc -c", stdin=True)
        await stream.write(STDIN, b"\n")
        await until_state(int(await stream.read(STDOUT)), "T")
        feeding = asyncio.create_task(stream.write(STDIN, bytes(3 << 20)))
        await bench.serves()
        assert not feeding.done()
        stream.send(Signal(number=signal.SIGCONT))
        await feeding
        stream.end(STDIN)
        assert (await bench.finish(stream)).stdout.strip() == str(3 << 20).encode()

    with_agent(scenario)


# -- several at once


def test_twenty_at_once_do_not_mix(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async def one(number: int) -> None:
            line = f"{number:03} " * 50 + "\n"
            data = line.encode() * 100
            ran = await bench.run(f"tee /dev/stderr; exit {number}", stdin=data)
            assert ran.stdout == ran.stderr == data
            assert ran.code == number

        await asyncio.gather(*(one(number) for number in range(20)))

    with_agent(scenario)


def resident(pid: int) -> int:
    """Peak resident memory in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_large_output_is_streamed_and_not_collected(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serves()
        before = resident(bench.pid)
        stream = bench.start("head -c 30000000 /dev/zero")
        size = 0
        while data := await stream.read(STDOUT):
            size += len(data)
        assert size == 30_000_000
        assert isinstance(await stream.result(), Exited)
        assert resident(bench.pid) - before < 4 << 20

    with_agent(scenario)


def test_a_stalled_reader_stops_its_own_command_and_nothing_else(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.serves()
        before = resident(bench.pid)
        stalled = bench.start("echo $$ >&2; head -c 20000000 /dev/zero; echo done >&2")
        pid = int(await stalled.read(STDERR))
        ran = await bench.run("head -c 3000000 /dev/zero; exit 2")
        assert (len(ran.stdout), ran.code) == (3_000_000, 2)
        assert resident(bench.pid) - before < 4 << 20
        assert not ended(pid)
        assert sum(map(len, stalled._chunks[STDOUT])) <= WINDOW
        rest = await bench.finish(stalled)
        assert (len(rest.stdout), rest.stderr, rest.code) == (20_000_000, b"done\n", 0)

    with_agent(scenario)


def test_an_idle_agent_does_not_wake_up(with_agent: Run) -> None:
    """Nothing polls: while commands run and say nothing, the agent is never scheduled."""

    def switches(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    async def scenario(bench: Bench) -> None:
        quiet = [bench.start("read line", stdin=True, timeout=1000) for _ in range(5)]
        stalled = [bench.start("head -c 2000000 /dev/zero"), bench.start("yes & echo $$ $! >&2")]
        pid, flood = (int(word) for word in (await stalled[1].read(STDERR)).split())
        await after_lingering(bench, pid)
        await bench.serves()
        await until_state(bench.pid, "S")
        before = switches(bench.pid)
        work = await asyncio.create_subprocess_exec("sleep", "0.4")
        await work.wait()
        assert switches(bench.pid) == before
        await bench.serves()
        assert switches(bench.pid) > before
        for stream in (*quiet, *stalled):
            stream.reset()
        os.kill(flood, signal.SIGKILL)

    with_agent(scenario)


# -- what outlives a command


def test_a_background_process_does_not_hold_up_its_command_and_lives_on(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        ran = await bench.run("sleep 100 & echo $!")
        assert ran.code == 0
        pid = int(ran.stdout)
        assert not ended(pid)
        await bench.serves()
        assert not ended(pid)
        await bench.run(f"kill {pid}")
        await until_ended(pid)

    with_agent(scenario)


def test_a_daemon_that_goes_on_writing_is_not_killed_by_it(with_agent: Run) -> None:
    """Its command has ended, nobody reads: its output is dropped, the pipe stays open."""

    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        script = "trap '' HUP; read x < go; for i in {1..30000}; do echo $i; done; echo error >&2; echo $? > survived"
        ran = await bench.run(f"nohup bash -c '{script}' & echo $!")
        pid = int(ran.stdout.split()[0])
        ran = await bench.run("echo > go; cat survived 2>/dev/null")
        await until_ended(pid)
        assert (bench.workspace / "survived").read_text(encoding="ascii") == "0\n"
        await bench.serves()

    with_agent(scenario)


def test_a_background_flood_does_not_keep_its_command_alive(with_agent: Run) -> None:
    """What was in the pipes when the command was over belongs to it; what comes later does not."""

    async def scenario(bench: Bench) -> None:
        stream = bench.start("yes & echo $$ $! >&2")
        command, pid = (int(word) for word in (await stream.read(STDERR)).split())
        await after_lingering(bench, command)  # meanwhile nobody reads
        size = 0
        while data := await stream.read(STDOUT):
            size += len(data)
        assert isinstance(await stream.result(), Exited)
        assert size <= WINDOW + (64 << 10)
        await bench.serves()
        os.kill(pid, signal.SIGKILL)
        await until_ended(pid)

    with_agent(scenario)


def test_a_background_flood_that_is_read_ends_too(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        begun = "begun=$(mktemp -u); mkfifo $begun; "  # it outlives the command, but what it says first comes before its end
        ran = await bench.run(
            begun + 'setsid sh -c "echo \\$\\$ >&2; : >$begun; exec cat /dev/zero" & read -r _ <$begun; rm $begun'
        )
        assert ran.code == 0
        await bench.serves()
        os.kill(int(ran.stderr), signal.SIGKILL)

    with_agent(scenario)


# -- giving up


def test_giving_a_stream_up_kills_its_command(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("sleep 100 & echo $! $$; cat", stdin=True)
        pids = (await stream.read(STDOUT)).split()
        stream.reset()
        with pytest.raises(Interrupted):
            await stream.result()
        for pid in pids:
            await until_ended(int(pid))
        await bench.serves()
        assert bench.guest.channel.mux.streams == 0

    with_agent(scenario)


def test_a_job_is_never_started_twice(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        assert (await bench.run("echo x >> log", job="once")).code == 0
        for _ in range(2):
            with pytest.raises(AlreadyExists, match="once"):
                await bench.run("echo x >> log", job="once")
        assert (bench.workspace / "log").read_bytes() == b"x\n"
        with pytest.raises(InvalidInput):
            await bench.run("true", job="refused", cwd="/no/such/directory")
        assert (await bench.run("true", job="refused")).code == 0

    with_agent(scenario)
