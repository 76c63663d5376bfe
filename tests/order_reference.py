"""The design's formula of the sample order, word for word, in Python integers: no numpy, nothing of the project's."""

from __future__ import annotations

from collections.abc import Sequence

M64 = 2**64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def ref_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
    return x ^ (x >> 31)


def ref_key(*parts: int | str) -> int:
    h = GOLDEN_RATIO
    for i, part in enumerate(parts, start=1):
        number = int.from_bytes(part.encode(), "little") if isinstance(part, str) else part
        h = ref_mix(((h ^ ref_mix((number + GOLDEN_RATIO * i) & M64)) + GOLDEN_RATIO) & M64)
    return h


def ref_perm(i: int, n: int, k: int) -> int:
    if n <= 64:
        hashes = [ref_mix(k ^ ref_mix((j + 1) * GOLDEN_RATIO & M64)) // 64 for j in range(n)]
        return sorted(range(n), key=lambda j: (hashes[j], j))[i]
    half = -(-(n - 1).bit_length() // 2)
    while True:
        left, right = divmod(i, 2**half)
        for r in range(1, 9):
            f = ref_mix(right ^ ref_mix((k + GOLDEN_RATIO * r) & M64))
            left, right = right, left ^ (f % 2**half)
        i = left * 2**half + right
        if i < n:
            return i


def ref_epoch(
    sizes: Sequence[int], batch: int, *, seed: int, epoch: int, lanes: int, chunk: int, window: int
) -> list[int]:
    """The design's formula, word for word: all samples of one epoch's steps in order of position."""
    n_samples = sum(sizes)
    c = min(chunk, max(1, n_samples // (4 * batch)))
    chunks: list[list[int]] = []
    first = 0
    for size in sizes:
        chunks += [list(range(first + a, first + min(a + c, size))) for a in range(0, size, c)]
        first += size
    chunk_key = ref_key(seed, epoch, "chunks")
    line = [s for i in range(len(chunks)) for s in chunks[ref_perm(i, len(chunks), chunk_key)]]
    length = n_samples // lanes
    ids = []
    for p in range(n_samples // batch * batch):
        lane, q = p % lanes, p // lanes
        u = q // window
        n = min(window, length - u * window)
        ids.append(line[lane * length + u * window + ref_perm(q - u * window, n, ref_key(seed, epoch, lane, u))])
    return ids


def ref_set_epoch(sizes: Sequence[int], *, seed: int, epoch: int, lanes: int, chunk: int, window: int) -> list[int]:
    """All V*L positions of an epoch, for a set inside a mixture."""
    length = sum(sizes) // lanes
    return ref_epoch(sizes, lanes, seed=seed, epoch=epoch, lanes=lanes, chunk=chunk, window=window)[: lanes * length]


def ref_mixture(
    sets: Sequence[dict], count: int, *, seed: int, block: int, first_epoch: int = 0
) -> list[tuple[int, int, int]]:
    """(set, its epoch, sample of the set) at the first `count` positions; `sets` hold quota, sizes, lanes, chunk,
    window. Walks from the beginning and gives each set the next sample of its own epochs."""
    epochs: dict[tuple[int, int], list[int]] = {}
    drawn = []
    taken = [0] * len(sets)
    for p in range(count):
        y = ref_perm(p % block, block, ref_key(seed, "block", p // block))
        i = 0
        while y >= sets[i]["quota"]:
            y -= sets[i]["quota"]
            i += 1
        s, own = sets[i], taken[i]
        taken[i] += 1
        length = sum(s["sizes"]) // s["lanes"] * s["lanes"]
        e = first_epoch + own // length
        if (i, e) not in epochs:
            options = {name: s[name] for name in ("lanes", "chunk", "window")}
            epochs[i, e] = ref_set_epoch(s["sizes"], seed=ref_key(seed, "set", i), epoch=e, **options)
        drawn.append((i, e, epochs[i, e][own % length]))
    return drawn
