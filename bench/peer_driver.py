"""Runs in a peer's own environment: takes orders as lines of JSON, and answers each with a line. Standard library, and the peer.

    {"do": "boot"}                      a sandbox made, `true` run in it, and left: {"ms": until `true` had ended}
    {"do": "start"}, {"do": "stop"}     one that stays; "ms" as for boot
    {"do": "run", "command": "..."}     in that one: {"ms": ...}

What goes wrong is {"error": "..."}. Each peer is asked for 512 MiB, one CPU and no acceleration, where it lets itself be asked.
"""

import asyncio
import contextlib
import json
import sys
import time


@contextlib.asynccontextmanager
async def quick_sandbox():
    """Its Alpine image; Debian's QEMU, since the one that it bundles wants a newer C library."""
    from quicksand import Sandbox

    async with Sandbox(image="alpine", memory="512M", cpus=1, accel="tcg", boot_timeout=200) as box:

        async def run(command):
            result = await box.execute(command)
            assert result.exit_code == 0, result

        yield run


@contextlib.asynccontextmanager
async def exec_sandbox():
    from exec_sandbox import Scheduler

    async with Scheduler() as scheduler, await scheduler.session(language="raw", memory_mb=512) as box:

        async def run(command):
            result = await box.exec(command)
            assert result.exit_code == 0, result

        yield run


@contextlib.asynccontextmanager
async def smolvm():
    from smolvm import SmolVM

    with SmolVM(backend="qemu", memory=512) as box:

        async def run(command):
            result = box.run(command)
            assert result.exit_code == 0, result

        yield run


PEERS = {"quick-sandbox": quick_sandbox, "exec-sandbox": exec_sandbox, "smolvm": smolvm}


def since(began):
    return {"ms": (time.perf_counter() - began) * 1e3}


async def serve(make):
    stack, run = contextlib.AsyncExitStack(), None
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        try:
            if order["do"] == "boot":
                async with make() as once:
                    await once("true")
                    answer = since(began)
            elif order["do"] == "start":
                run = await stack.enter_async_context(make())
                await run("true")
                answer = since(began)
            elif order["do"] == "run":
                await run(order["command"])
                answer = since(began)
            else:
                await stack.aclose()
                answer = since(began)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is the reason why it is left out
            said = " ".join(f"{type(error).__name__}: {error}".split())
            answer = {"error": said[:300]}
        print(json.dumps(answer), file=ANSWERS, flush=True)


if __name__ == "__main__":
    ANSWERS, sys.stdout = sys.stdout, sys.stderr  # what a peer prints is no answer
    asyncio.run(serve(PEERS[sys.argv[1]]))
