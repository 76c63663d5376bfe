"""Small fixtures made on the spot: image data sets, tiny runs inside this process."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xxhash
from PIL import Image

from data_tools import ustar
from data_tools.index import index_bytes, key_hash
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo, index_name

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="needs g++ and Python's headers (Debian: g++ python3-dev)",
)


class Member(NamedTuple):
    """One sample to be written: encoded image and label. `crc32` None: the right one."""

    data: bytes
    label: int
    crc32: int | None = None


def picture(seed: int, height: int = 12, width: int = 10, channels: int = 3) -> np.ndarray:
    """Random pixels, uint8 [height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "png")
    return buffer.getvalue()


def members(count: int, classes: int = 3, first: int = 0) -> list[Member]:
    return [Member(png(picture(i, 9 + i % 5, 8 + i % 7)), i % classes) for i in range(first, first + count)]


def write_dataset(folder: Path, splits: dict[str, Sequence[Sequence[Member]]], classes: int | None = 3) -> Path:
    """A data set of the project's format: for each split a list of shards, each a list of members."""
    folder.mkdir(parents=True, exist_ok=True)
    infos: dict[str, list[ShardInfo]] = {}
    for split, shards in splits.items():
        infos[split] = []
        for number, shard in enumerate(shards):
            name = f"{split}-{number:06d}.tar"
            tar, rows = bytearray(), []
            for i, m in enumerate(shard):
                tar += ustar.header(f"{number:03d}{i:05d}.png", len(m.data))
                crc = zlib.crc32(m.data) if m.crc32 is None else m.crc32
                rows.append((key_hash(f"{number:03d}{i:05d}"), len(tar), len(m.data), crc, m.label, 0, 0))
                tar += m.data + ustar.padding(len(m.data))
            tar += ustar.END
            index = index_bytes(rows)
            (folder / name).write_bytes(tar)
            (folder / index_name(name)).write_bytes(index)
            infos[split].append(
                ShardInfo(
                    name, len(shard), len(tar), xxhash.xxh3_128_hexdigest(bytes(tar)), xxhash.xxh3_128_hexdigest(index)
                )
            )
    names = [f"class{i}" for i in range(classes)] if classes else None
    (folder / MANIFEST_NAME).write_text(DatasetManifest(infos, names).to_json())
    return folder


def shards_of(samples: list[Member], sizes: Sequence[int]) -> list[list[Member]]:
    """`samples` cut into shards of these sizes."""
    ends = np.cumsum(sizes)
    assert ends[-1] == len(samples)
    return [samples[e - s : e] for s, e in zip(sizes, ends)]


TINY_MODEL = [
    "model.name=mixer_s16",
    "model.image_size=8",
    "model.patch_size=4",
    "model.hidden_dim=16",
    "model.num_blocks=2",
    "model.tokens_mlp_dim=8",
    "model.channels_mlp_dim=32",
    "model.num_classes=4",
]
TINY = [
    "data.train=synthetic",
    "data.val=none",
    "data.num_workers=0",
    *TINY_MODEL,
    "train.duration=8 steps",
    "train.global_batch_size=16",
    "train.precision=fp32",
    "train.strategy=ddp",
    "optimizer.lr=0.01",
    "checkpoint.every=4 steps",
    "logging.every=1 steps",
    "logging.to=[]",
]


@contextmanager
def as_before() -> Iterator[None]:
    """Trains on the CPU, and puts environment and signal handlers back: a training in this process sets both."""
    environment = dict(os.environ)
    os.environ["MIXER_DEVICE"] = "cpu"
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(run_dir: Path, *overrides: str, recipe: Path | None = None, allow: Sequence[str] = ()) -> int:
    """One training of one rank in this process, as `mixer train` runs it: TINY < overrides. The exit code."""
    from pipeline.cli import run_training
    from pipeline.config import load_config

    base: list[str] = [] if recipe else TINY
    config = load_config(str(recipe) if recipe else None, [*base, f"run.dir={run_dir}", *overrides]).config
    with as_before():
        return run_training(config, set(allow))


def script(code: str, *args: Any, **env: str) -> list[str]:
    """argv of a Python process that runs `code` with this folder importable; `env` becomes assignments."""
    lines = [f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"]
    lines += [f"os.environ[{k!r}] = {v!r}" for k, v in env.items()]
    return [sys.executable, "-c", "\n".join([*lines, code]), *map(str, args)]
