"""RAM files over generations of patches, against plain bytes."""

import itertools
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis.strategies import binary, booleans, dictionaries, integers, lists, one_of, sampled_from, tuples

from capsem.store.ram import PAGE, RamFile, RamIdentity, RamWriter, verify

PAGES = 24
SIZE = PAGES * PAGE

filling = one_of(sampled_from([b"\0", b"\1"]), binary(min_size=1, max_size=3))
patches = dictionaries(integers(0, PAGES - 1), filling, max_size=PAGES)


def grouped(patch: dict[int, bytes], limit: int) -> list[tuple[int, memoryview]]:
    """Pages as pieces of neighbours, at most `limit` pages each."""
    pieces: list[tuple[int, bytes]] = []
    for number in sorted(patch):
        data = (patch[number] * PAGE)[:PAGE]
        if pieces and pieces[-1][0] + len(pieces[-1][1]) == number * PAGE and len(pieces[-1][1]) < limit * PAGE:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + data)
        else:
            pieces.append((number * PAGE, data))
    return [(offset, memoryview(data)) for offset, data in pieces]


@settings(max_examples=60)
@given(lists(tuples(patches, booleans(), integers(1, PAGES)), min_size=1, max_size=6))
def test_every_generation_is_what_the_patches_say(generations: list[tuple[dict[int, bytes], bool, int]]) -> None:
    model = bytearray(SIZE)
    with tempfile.TemporaryDirectory() as text:
        base: RamFile | None = None
        for number, (patch, compare, limit) in enumerate(generations):
            ram, sums = Path(text) / f"{number}.ram", Path(text) / f"{number}.sums"
            writer = RamWriter(ram, sums, SIZE)
            if base is not None:
                assert writer.copy(base)
                base.close()
            before = bytes(model)
            pieces = grouped(patch, limit)
            for offset, data in pieces:
                model[offset : offset + len(data)] = data
            runs, written = writer.patch(pieces, compare=compare)
            digest = writer.finish(RamIdentity("box", "a" * 32, SIZE))
            writer.close()

            assert ram.read_bytes()[:SIZE] == model
            verify(ram, sums, SIZE, digest)
            told = {at // PAGE for start, length in runs for at in range(start, start + length, PAGE)}
            changed = {n for n in range(PAGES) if before[n * PAGE :][:PAGE] != model[n * PAGE :][:PAGE]}
            assert told == (changed if compare else set(patch))
            assert written == sum(PAGE for n in told if any(model[n * PAGE :][:PAGE]))
            assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(runs)), "ascending, joined"
            base = RamFile(ram, sums)
        assert base is not None
        base.close()
