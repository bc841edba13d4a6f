"""The same VM another day: many commands at once, a copy of the running machine, and the end of both."""

import asyncio

from capsem import AsyncSandbox


async def main() -> None:
    """Ten lines."""
    box = await AsyncSandbox.connect("ten-lines")  # resumed if it is suspended
    squares = await asyncio.gather(*(box.exec(f"echo $(({n} * {n}))") for n in range(5)))
    print("squares", [int(result.stdout) for result in squares])
    waiting = await box.spawn("read x && echo got $x | tee note", stdin=True)
    twin = await box.fork("ten-lines-twin")  # disk and memory; there nobody holds the input
    await waiting.write("it\n")
    async for piece in waiting:
        print(piece.text, end="")
    print("twin has", [entry.name for entry in await twin.files.list()])
    await asyncio.gather(twin.delete(), box.delete())


asyncio.run(main())
