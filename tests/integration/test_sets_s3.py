"""Mixtures, MixUp and subsets from an object store, through the cache: the same run as from local files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import members, shards_of, train, write_dataset
from mixer_process import assert_same_run
from s3_server import S3Server

from pipeline.data.cache import BEAT
from pipeline.data.node_cache import NodeCache

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = pytest.mark.s3

STEPS = 12


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_dataset(folder / "a", {"train": shards_of(members(90), [50, 40])})
    write_dataset(folder / "b", {"train": [members(40, first=90)]})
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, local: Path) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.client().create_bucket(Bucket="sets")
    for path in local.glob("*/*"):
        server.client().put_object(Bucket="sets", Key=f"{path.parent.name}/{path.name}", Body=path.read_bytes())
    yield server
    server.kill()


def mixture(where: Path | str) -> list[str]:
    sets = f"[{{path: {where}/a, weight: 0.6}}, {{path: {where}/b, weight: 0.4}}]"
    return [f"data.train={sets}", "augment.mixup_alpha=0.5", "augment.mixup_group=8"]


def subset(where: Path | str) -> list[str]:
    return [f"data.train={where}/a", "data.subset=60%"]


@pytest.mark.parametrize("data", [mixture, subset])
def test_from_a_store_as_from_local_files(local, server, tmp_path, monkeypatch, data: Callable[..., list[str]]):
    fetched = []
    close = NodeCache.close

    def closed(cache: NodeCache) -> None:
        fetched.append(json.loads((cache.folder / BEAT).read_text())["fetched"])
        close(cache)

    monkeypatch.setattr(NodeCache, "close", closed)
    common = ["model.num_classes=3", "data.chunk=4", "data.window=4", "data.num_workers=2"]
    common += ["train.micro_batch_size=8", "scheduler.name=constant"]
    store = [f"data.storage_options={json.dumps(server.options)}", f"data.cache_dir={tmp_path / 'cache'}"]
    here, there = tmp_path / "local" / "run", tmp_path / "store" / "run"
    assert train(here, *data(local), *common, f"train.duration={STEPS} steps") == 0
    assert fetched == []
    assert train(there, *data("s3://sets"), *common, *store, "train.duration=5 steps") == 0
    assert train(there, *data("s3://sets"), *common, *store, f"train.duration={STEPS} steps") == 0
    assert_same_run(there, here, STEPS)
    assert len(fetched) == 2 and min(fetched) > 0
    assert list((tmp_path / "cache").iterdir()) == []
