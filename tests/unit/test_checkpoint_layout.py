"""The flat-piece format: any splitting is read back in any other, gaps and overlaps are found, damage is seen."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.checkpoint.layout import (
    MANIFEST,
    STATE,
    CheckpointError,
    CheckpointManifest,
    CheckpointReader,
    FileRecord,
    InitialState,
    Key,
    check_coverage,
    load_pieces,
    write_pieces,
)
from pipeline.parallel.engine import BUFFER, EMA, WEIGHT, Piece

SHAPES: dict[Key, tuple[int, ...]] = {
    ("stem.weight", WEIGHT): (4, 3, 2),
    ("stem.weight", "exp_avg"): (4, 3, 2),
    ("stem.weight", EMA): (4, 3, 2),
    ("head.bias", WEIGHT): (5,),
    ("head.bias", "exp_avg"): (5,),
    ("norm.mean", BUFFER): (7,),
    ("empty", WEIGHT): (0, 3),
    ("one", WEIGHT): (1,),
}


def values() -> dict[Key, torch.Tensor]:
    """Every tensor flat, with numbers that occur nowhere else."""
    numbers = itertools.count(1)
    return {key: torch.tensor([float(next(numbers)) for _ in range(prod(shape))]) for key, shape in SHAPES.items()}


def commit(
    folder: Path, per_writer: Iterable[Iterable[Piece]], shapes: dict[Key, tuple[int, ...]] | None = None
) -> CheckpointReader:
    """A checkpoint as a save leaves it, from each writer's pieces."""
    folder.mkdir(exist_ok=True)
    files = [write_pieces(folder / f"rank-{i}.safetensors", pieces) for i, pieces in enumerate(per_writer)]
    check_coverage(shapes or SHAPES, files)
    (folder / STATE).write_text('{"step": 3}')
    manifest = CheckpointManifest(
        3, shapes or SHAPES, files, xxhash.xxh3_128_hexdigest(b'{"step": 3}'), {"top1": 0.5}, {"world_size": 1}
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return CheckpointReader(folder)


def one_writer() -> list[list[Piece]]:
    return [[Piece(name, kind, 0, data) for (name, kind), data in values().items()]]


@st.composite
def splittings(draw: st.DrawFn) -> list[list[Piece]]:
    """Every tensor cut anywhere, its pieces dealt to any of up to five writers in any order; some pieces empty."""
    writers = draw(st.integers(1, 5))
    dealt: list[list[Piece]] = [[] for _ in range(writers)]
    for (name, kind), data in values().items():
        cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
        for a, b in itertools.pairwise([0, *cuts, len(data)]):
            dealt[draw(st.integers(0, writers - 1))].append(Piece(name, kind, a, data[a:b]))
    return [draw(st.permutations(pieces)) for pieces in dealt]


@settings(max_examples=60)
@given(splittings(), splittings())
def test_any_splitting_is_read_back_in_any_other(written, wanted):
    with tempfile.TemporaryDirectory() as folder:
        reader = commit(Path(folder), written)
        blank = [[Piece(p.name, p.kind, p.offset, torch.full_like(p.data, -1)) for p in ps] for ps in wanted]
        for pieces, expected in zip(blank, wanted):
            load_pieces(pieces, reader)
            assert all(torch.equal(p.data, e.data) for p, e in zip(pieces, expected))
        for (name, kind), data in values().items():
            assert torch.equal(reader.tensor(name, kind), data.view(SHAPES[name, kind]))


def test_the_digest_does_not_tell_who_wrote_which_piece(tmp_path):
    whole = commit(tmp_path / "a", one_writer())
    halves = [
        [
            Piece(p.name, p.kind, p.offset + a, p.data[a:b])
            for p in one_writer()[0]
            for a, b in [(0, len(p.data) // 2) if first else (len(p.data) // 2, len(p.data))]
        ]
        for first in (True, False)
    ]
    assert commit(tmp_path / "b", halves).digest() == whole.digest()
    changed = one_writer()
    changed[0][0].data[3] += 1
    assert commit(tmp_path / "c", changed).digest() != whole.digest()


def test_files_are_ordinary_safetensors(tmp_path):
    commit(tmp_path, one_writer())
    stored = load_file(tmp_path / "rank-0.safetensors")
    assert stored.keys() == {f"{k}/{n}@0" for (n, k), s in SHAPES.items() if prod(s)}
    for (name, kind), data in values().items():
        if len(data):
            assert torch.equal(stored[f"{kind}/{name}@0"], data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_types_are_kept(tmp_path, dtype):
    data = (torch.arange(9) % 2).to(dtype)
    reader = commit(tmp_path, [[Piece("x", WEIGHT, 0, data)]], {("x", WEIGHT): (3, 3)})
    assert reader.tensor("x").dtype == dtype and torch.equal(reader.tensor("x").view(-1), data)


def test_a_file_says_its_own_size_and_hash(tmp_path):
    record = write_pieces(tmp_path / "f.safetensors", one_writer()[0])
    raw = (tmp_path / "f.safetensors").read_bytes()
    assert (record.bytes, record.hash) == (len(raw), xxhash.xxh3_128_hexdigest(raw))
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    empty = write_pieces(tmp_path / "g.safetensors", [])
    assert empty.pieces == [] and load_file(tmp_path / "g.safetensors") == {}


def test_the_manifest_survives_its_own_file(tmp_path):
    reader = commit(tmp_path, one_writer())
    assert reader.manifest.tensors == SHAPES
    assert reader.manifest.metrics == {"top1": 0.5}
    assert reader.state() == {"step": 3}
    assert CheckpointManifest.load(tmp_path) == reader.manifest
    json.loads((tmp_path / MANIFEST).read_text())


# ----------------------------------------------------------------------------------------------- coverage


def record(*pieces: tuple[str, str, int, int]) -> FileRecord:
    return FileRecord("f", 0, "", list(pieces))


@pytest.mark.parametrize(
    "pieces, message",
    [
        ([("x", WEIGHT, 0, 2), ("x", WEIGHT, 3, 3)], "from 2 on are missing"),
        ([("x", WEIGHT, 1, 5)], "from 0 on are missing"),
        ([("x", WEIGHT, 0, 4), ("x", WEIGHT, 3, 3)], "from 3 on are written twice"),
        ([("x", WEIGHT, 0, 6), ("x", WEIGHT, 0, 6)], "written twice"),
        ([("x", WEIGHT, 0, 5)], "5 of 6 elements were written"),
        ([("x", WEIGHT, 0, 7)], "7 of 6 elements were written"),
        ([], "0 of 6 elements were written"),
        ([("x", WEIGHT, 0, 6), ("y", WEIGHT, 0, 1)], "y, which is not part of the state"),
        ([("x", WEIGHT, 0, 6), ("x", EMA, 0, 6)], "ema of x, which is not part of the state"),
    ],
)
def test_coverage_finds_gap_overlap_foreign_and_short(pieces, message):
    with pytest.raises(CheckpointError, match=message):
        check_coverage({("x", WEIGHT): (2, 3)}, [record(p) for p in pieces])


@settings(max_examples=60)
@given(splittings(), st.data())
def test_coverage_takes_any_splitting_and_no_loss_of_a_piece(written, data):
    files = [record(*[(p.name, p.kind, p.offset, len(p.data)) for p in pieces if len(p.data)]) for pieces in written]
    check_coverage(SHAPES, files)
    victim = data.draw(st.sampled_from([f for f in files if f.pieces]))
    dropped = victim.pieces.pop(data.draw(st.integers(0, len(victim.pieces) - 1)))
    with pytest.raises(CheckpointError):
        check_coverage(SHAPES, files)
    victim.pieces.extend([dropped, dropped])
    with pytest.raises(CheckpointError):
        check_coverage(SHAPES, files)


# ------------------------------------------------------------------------------------------------- damage


def all_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def found_damage(folder: Path) -> bool:
    """What a start looks at: manifest, state, then size and hash of every file."""
    try:
        reader = CheckpointReader(folder)
        reader.state()
        return reader.damage(reader.manifest.files) is not None
    except CheckpointError:
        return True


def damages(raw: bytes) -> Iterator[bytes]:
    for at in {0, 7, 8, min(20, len(raw) - 2), len(raw) // 3, len(raw) // 2, len(raw) * 4 // 5, len(raw) - 2}:
        yield raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
    yield raw[:-1] if raw[-1:] != b"\n" else raw[:-2]
    yield raw[: len(raw) // 2]
    yield b""
    if raw[-1:] != b"\n":
        yield raw + b"\0"


@pytest.mark.parametrize("name", [MANIFEST, STATE, "rank-0.safetensors"])
def test_any_damage_is_found(tmp_path, name):
    commit(tmp_path, one_writer())
    assert not found_damage(tmp_path)
    path = tmp_path / name
    raw = path.read_bytes()
    for bad in damages(raw):
        path.write_bytes(bad)
        assert found_damage(tmp_path), bad
    path.unlink()
    assert found_damage(tmp_path)
    path.write_bytes(raw)
    assert not found_damage(tmp_path)


def test_every_flipped_byte_of_the_manifest_is_found(tmp_path):
    """It is not listed in itself; a changed digit in it would still be good JSON."""
    commit(tmp_path, one_writer())
    raw = (tmp_path / MANIFEST).read_bytes()
    for at in range(len(raw) - 1):
        (tmp_path / MANIFEST).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert found_damage(tmp_path), (at, raw[max(0, at - 20) : at + 5])


def test_messages_say_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint: it has no {MANIFEST}"):
        CheckpointReader(tmp_path)
    reader = commit(tmp_path, one_writer())
    with pytest.raises(CheckpointError, match="holds no weight of other: it is of another model"):
        reader.read("other", WEIGHT, 0, 1)
    raw = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**raw, "version": 9}))
    with pytest.raises(CheckpointError, match=r"checkpoint format 9.*upgrade"):
        CheckpointReader(tmp_path)
    (tmp_path / MANIFEST).write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="is damaged"):
        CheckpointReader(tmp_path)


# ------------------------------------------------------------------------------------------ initial values


def test_initial_state_is_cut_out_of_whole_tensors():
    made: list[str] = []

    def initial(name: str) -> torch.Tensor:
        made.append(name)
        return torch.arange(6.0).view(2, 3)

    state = InitialState(initial)
    pieces = [
        Piece("w", WEIGHT, 2, torch.empty(3)),
        Piece("w", EMA, 0, torch.empty(6)),
        Piece("w", "exp_avg_sq", 1, torch.empty(2)),
        Piece("w", WEIGHT, 6, torch.empty(0)),
    ]
    load_pieces(pieces, state)
    assert [p.data.tolist() for p in pieces] == [[2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 0], []]
    assert made == ["w"]
    with pytest.raises(CheckpointError, match="no initial value for step of w"):
        state.read("w", "step", 0, 1)
