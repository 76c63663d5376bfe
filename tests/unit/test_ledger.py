"""The ledger's file format: what is written is read, whatever a crash cut short, however often files rotate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ledger import LedgerReader, LedgerWriter, ledger_files

Row = tuple[int, int, int, int, int, list]  # attempt, step, epoch, position, digest, masked


def writer(folder: Path, attempt: int = 0, **options: Any) -> LedgerWriter:
    return LedgerWriter(folder, 3, attempt=attempt, first=8, last=12, batch=16, **options)


def read(folder: Path) -> list[Row]:
    rows = []
    for s in LedgerReader(folder, 3):
        assert (s.first, s.last) == (8, 12)
        for i, digest in enumerate(s.digests):
            masked = s.masked.get(s.step + i, [])
            rows.append((s.attempt, s.step + i, s.epoch, s.position + 16 * i, int(digest), masked))
    return rows


def steps(attempt: int, first: int, count: int, rng: np.random.Generator) -> list[Row]:
    """Steps with epochs of 5 of them, and now and then a masked slot."""
    rows: list[Row] = []
    for step in range(first, first + count):
        masked = [[9, step, 'crc32 is "not" the\nindex\'']] if rng.random() < 0.1 else []
        digest = int(rng.integers(0, 2**64, dtype=np.uint64))
        rows.append((attempt, step, (step - 1) // 5, (step - 1) % 5 * 16, digest, masked))
    return rows


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([1, 60, 300, 10**6]), st.data())
def test_what_is_written_is_read_also_after_cuts_anywhere(tmp_path_factory, seed, file_bytes, data):
    folder, rng = tmp_path_factory.mktemp("ledger"), np.random.default_rng(seed)
    expected: list[Row] = []
    for attempt in range(data.draw(st.integers(1, 4))):
        ledger = writer(folder, attempt, file_bytes=file_bytes)
        rows = steps(attempt, attempt * 3 + 1, data.draw(st.integers(0, 12)), rng)
        for _, step, epoch, position, digest, masked in rows:
            ledger.add(step, epoch, position, digest, masked)
        cut = data.draw(st.integers(0, 25))  # less than a digest and its line's beginning, or more
        files = ledger_files(folder, 3)
        if cut and rows and files and files[-1].stat().st_size >= cut:
            files[-1].write_bytes(files[-1].read_bytes()[:-cut])
            kept = len(read(folder)) - len(expected)
            assert len(rows) - kept <= 2
            rows = rows[:kept]
        expected += rows
    assert read(folder) == expected
    shutil.rmtree(folder)


def test_a_long_run_takes_16_bytes_a_step(tmp_path):
    ledger = writer(tmp_path, file_bytes=20_000)
    digests = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64).tolist()
    for i, digest in enumerate(digests):
        ledger.add(i + 1, 0, 16 * i, digest)
    files = ledger_files(tmp_path, 3)
    assert len(files) == 5 and all(f.stat().st_size < 20_100 for f in files)
    assert sum(f.stat().st_size for f in files) < 16.2 * 5000
    assert [row[4] for row in read(tmp_path)] == digests


def test_what_is_not_a_ledger_line_is_passed_over(tmp_path):
    ledger = writer(tmp_path)
    ledger.add(1, 0, 0, 5)
    (path,) = ledger_files(tmp_path, 3)
    path.write_bytes(path.read_bytes() + b"\0" * 100 + b"\nnonsense\nmasked {\n1 2 3\n0 2 0 16 8 12 16 \n")
    ledger = writer(tmp_path, attempt=1)
    ledger.add(2, 0, 16, 6)
    assert read(tmp_path) == [(0, 1, 0, 0, 5, []), (1, 2, 0, 16, 6, [])]


def test_a_full_disk_loses_nothing(tmp_path):
    folder = tmp_path / "ledger"
    folder.write_text("in the way")  # every write fails, as on a full disk
    ledger = writer(folder)
    ledger.add(1, 0, 0, 5)
    ledger.add(2, 0, 16, 6, [(9, 1, "bad")])
    ledger.sync()
    folder.unlink()
    ledger.add(3, 0, 32, 7)
    assert read(folder) == [(0, 1, 0, 0, 5, []), (0, 2, 0, 16, 6, [[9, 1, "bad"]]), (0, 3, 0, 32, 7, [])]


def test_a_sync_and_the_next_attempt_write_what_a_full_disk_did_not_take(tmp_path):
    folder = tmp_path / "ledger"
    folder.write_text("in the way")
    ledger = writer(folder)
    ledger.add(1, 0, 0, 5)
    later = LedgerWriter(folder, 3, attempt=1, first=8, last=12, batch=16, unwritten=ledger.unwritten)
    later.add(1, 0, 16, 6)
    folder.unlink()
    later.sync()
    assert read(folder) == [(0, 1, 0, 0, 5, []), (1, 1, 0, 16, 6, [])]


def test_a_segments_part():
    segment = LedgerReader._parse(LedgerReader(Path("/none"), 0), b"1 10 2 160 0 16 16 " + b"0" * 15 + b"1" + b"0" * 32)
    assert segment is not None and (segment.step, segment.end) == (10, 13)
    part = segment.part(11, 99)
    assert (part.step, part.position, part.digests.tolist()) == (11, 176, [0, 0])
    assert len(segment.part(13, 20).digests) == 0


@pytest.mark.parametrize("rank", [0, 99_999, 123_456])
def test_ranks_of_any_number(tmp_path, rank):
    LedgerWriter(tmp_path, rank, attempt=0, first=0, last=1, batch=1).add(1, 0, 0, 9)
    assert [s.digests.tolist() for s in LedgerReader(tmp_path, rank)] == [[9]]
