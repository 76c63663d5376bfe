"""Reading samples from tars: what is refused, what is a bad sample, and how many files stay open."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import Member, members, picture, png, shards_of, write_dataset

from data_tools.errors import UserError
from data_tools.manifest import ShardInfo, index_name
from pipeline.data.shards import ShardTable
from pipeline.data.source import BadSample, TarSource, open_source
from pipeline.data.synthetic import SyntheticSource


def open_files(folder: Path) -> int:
    """Descriptors of this process that point into `folder`."""
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sum(t.startswith(str(folder)) for t in targets)


def test_reads_every_sample_in_order(tmp_path):
    samples = members(11)
    source = TarSource(write_dataset(tmp_path, {"train": shards_of(samples, [4, 0, 5, 2])}), "train")
    assert source.shard_sizes == [4, 0, 5, 2]
    assert source.classes == ["class0", "class1", "class2"]
    for i, m in enumerate(samples):
        pixels, label, crc = source.read(i, 3)
        assert (label, crc) == (m.label, zlib.crc32(m.data))
        assert np.array_equal(pixels, picture(i, 9 + i % 5, 8 + i % 7))


def test_reads_what_the_sharding_tool_wrote(tmp_path):
    from data_tools.engines import ShardOptions, shard_corpus

    for i in range(20):
        path = tmp_path / "corpus" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(i)))
    out = tmp_path / "set"
    shard_corpus(ShardOptions(tmp_path / "corpus", out, val_fraction=0.3, max_samples=4, workers=1))
    seen = []
    for split in ("train", "val"):
        source = TarSource(out, split)
        assert all(n <= 4 for n in source.shard_sizes)
        for i in range(sum(source.shard_sizes)):
            pixels, label, _ = source.read(i, 3)
            number = next(k for k in range(20) if np.array_equal(pixels, picture(k)))
            assert label == number % 2
            seen.append(number)
    assert sorted(seen) == list(range(20))


def test_few_files_stay_open(tmp_path):
    write_dataset(tmp_path, {"train": shards_of(members(40), [1] * 40)})
    source = TarSource(tmp_path, "train", max_open=3)
    ids = np.random.default_rng(0).permutation(np.arange(40).repeat(3))
    for i in ids.tolist():
        assert source.read(i, 3).label == i % 3
        # A tar and the mapping of its index
        assert open_files(tmp_path) <= 2 * 3
    assert len({source.read(i, 3).crc32 for i in range(40)}) == 40


def test_a_row_is_read_from_an_index_that_is_not_mapped_and_its_loss_is_said(tmp_path):
    """As in sets of more shards than files may be open."""
    write_dataset(tmp_path, {"train": shards_of(members(8), [2] * 4)})
    source = TarSource(tmp_path, "train", max_open=1)
    before = [source.encoded(i) for i in range(8)]
    assert [source.encoded(i) for i in range(7, -1, -1)] == before[::-1]
    index = tmp_path / source.shards[0].index_name
    os.truncate(index, index.stat().st_size - 36)
    assert source.encoded(0) == before[0]
    with pytest.raises(UserError, match=r"train-000000\.idx\.npy is damaged"):
        source.encoded(1)
    index.unlink()
    with pytest.raises(UserError, match=r"train-000000\.idx\.npy is missing"):
        source.encoded(0)


def test_a_table_of_shards_reads_like_the_list_it_was_made_of():
    infos = [ShardInfo(f"träin-{i}.tar", i, 10 * i, f"{i:032x}", f"{i + 1:032x}") for i in range(5)]
    table = ShardTable(infos)
    assert list(table) == infos and table[-1] == infos[-1] and table[1:3] == infos[1:3] and len(table) == 5
    assert list(ShardTable([])) == []
    assert list(pickle.loads(pickle.dumps(table))) == infos


def test_a_data_set_of_one_split_is_taken_whatever_its_name(tmp_path):
    write_dataset(tmp_path, {"all": [members(3)]})
    assert TarSource(tmp_path, "train").read(2, 3).label == 2


# ----------------------------------------------------------------------------------------------- refusals


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no dataset.json in .*mixer shard"):
        open_source(str(tmp_path), "train", image_size=8, num_classes=None)
    (tmp_path / "dataset.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="is not a data set manifest"):
        TarSource(tmp_path, "train")
    (tmp_path / "dataset.json").write_text('{"version": 99, "splits": {}}')
    with pytest.raises(UserError, match="format version 99"):
        TarSource(tmp_path, "train")


def test_an_unknown_split_is_refused_with_those_that_exist(tmp_path):
    write_dataset(tmp_path, {"train": [members(2)], "val": [members(2)]})
    with pytest.raises(UserError, match=r"no split test \(it has: train, val\)"):
        TarSource(tmp_path, "test")


def test_a_missing_shard_is_refused_at_the_start(tmp_path):
    write_dataset(tmp_path, {"train": shards_of(members(4), [2, 2])})
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001.tar.*is missing.*shard again"):
        TarSource(tmp_path, "train")


@pytest.mark.parametrize("change", [-1, 512])
def test_a_shard_of_another_size_is_refused_at_the_start(tmp_path, change):
    write_dataset(tmp_path, {"train": [members(2)]})
    path = tmp_path / "train-000000.tar"
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(UserError, match=r"bytes, the manifest says .*mixer data verify"):
        TarSource(tmp_path, "train")


def test_an_index_of_another_tar_is_refused(tmp_path):
    write_dataset(tmp_path, {"train": shards_of(members(5), [2, 3])})
    first, second = (tmp_path / index_name(f"train-00000{i}.tar") for i in range(2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="mixer data index"):
        TarSource(tmp_path, "train").read(0, 3)
    first.unlink()
    with pytest.raises(UserError, match="has no index; run `mixer data index`"):
        TarSource(tmp_path, "train").read(0, 3)
    first.write_bytes(b"\x93NUMPY nothing")
    with pytest.raises(UserError, match="damaged"):
        TarSource(tmp_path, "train").read(0, 3)


def test_an_index_of_the_same_length_but_other_content_is_refused(tmp_path):
    """Its labels would be trained on: offsets can agree where all images have one size."""
    one = png(picture(0))
    write_dataset(tmp_path, {"train": [[Member(one, 0), Member(one, 1)], [Member(one, 1), Member(one, 0)]]})
    first, second = (tmp_path / index_name(f"train-00000{i}.tar") for i in range(2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="mixer data index"):
        TarSource(tmp_path, "train").read(0, 3)


# -------------------------------------------------------------------------------------------- bad samples


def test_a_flipped_byte_is_a_bad_sample_that_says_where(tmp_path):
    write_dataset(tmp_path, {"train": shards_of(members(4), [2, 2])})
    path = tmp_path / "train-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[512 + 60] ^= 1
    path.write_bytes(raw)
    source = TarSource(tmp_path, "train")
    with pytest.raises(BadSample, match=r"train-000001.tar row 0: crc32"):
        source.read(2, 3)
    assert [source.read(i, 3).label for i in (0, 1, 3)] == [0, 1, 0]


def test_undecodable_bytes_with_the_right_crc_are_a_bad_sample(tmp_path):
    write_dataset(tmp_path, {"train": [[Member(b"no image at all", 0), *members(1)]]})
    with pytest.raises(BadSample, match=r"train-000000\.tar row 0: cannot identify image"):
        TarSource(tmp_path, "train").read(0, 3)


# ------------------------------------------------------------------------------------- digest, other sources


def test_the_digest_follows_content_not_place(tmp_path):
    shards = shards_of(members(4), [2, 2])
    one = TarSource(write_dataset(tmp_path / "a", {"train": shards}), "train").digest
    assert TarSource(write_dataset(tmp_path / "b", {"train": shards, "val": [members(1)]}), "train").digest == one
    others = [shards[::-1], shards_of(members(4), [3, 1]), shards_of(members(4, first=1), [2, 2]), shards[:1]]
    digests = {TarSource(write_dataset(tmp_path / f"c{i}", {"train": o}), "train").digest for i, o in enumerate(others)}
    assert len(digests | {one}) == 5


def test_tars_are_readable_by_anything(tmp_path):
    """The helper of these tests writes what the sharding tool writes."""
    samples = members(3)
    write_dataset(tmp_path, {"train": [samples]})
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        files = [tar.extractfile(m) for m in tar.getmembers()]
        assert [f.read() for f in files if f] == [m.data for m in samples]
    assert json.loads((tmp_path / "dataset.json").read_text())["version"] == 1


def test_synthetic_images_hang_on_their_number_alone():
    source = open_source("synthetic", "train", image_size=8, num_classes=5)
    assert isinstance(source, SyntheticSource) and sum(source.shard_sizes) == 10_000
    labels = [source.read(i, 3).label for i in range(400)]
    assert set(labels) == set(range(5))
    again = open_source("synthetic", "train", image_size=8, num_classes=5)
    assert again.digest == source.digest
    assert np.array_equal(again.read(17, 3).pixels, source.read(17, 3).pixels)
    assert source.read(17, 3).pixels.shape == (8, 8, 3) and source.read(17, 1).pixels.shape == (8, 8, 1)
    val = open_source("synthetic", "val", image_size=8, num_classes=5)
    assert val.digest != source.digest and not np.array_equal(val.read(17, 3).pixels, source.read(17, 3).pixels)
