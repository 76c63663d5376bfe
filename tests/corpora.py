"""Small image corpora and runs of the sharding command, for tests."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import simplejpeg


def jpeg(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 8, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=90)


def make_corpus(root: Path, count: int, classes: int = 3, side: int = 24) -> Path:
    for i in range(count):
        path = root / f"class{i % classes}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i, side))
    return root


def repeated(root: Path, count: int = 5000, distinct: int = 600) -> Path:
    """Many images, most of which are there several times: enough for several hashing tasks."""
    make_corpus(root, distinct)
    for i in range(distinct, count):
        original = root / f"class{i % distinct % 3}" / f"{i % distinct:05d}.jpg"
        (root / f"class{i % 3}" / f"{i:05d}.jpg").write_bytes(original.read_bytes())
    return root


def set_files(out: Path) -> dict[str, bytes]:
    """Every file of a data set, plan and markers left out."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def start(*args: str | Path | int, **kw) -> subprocess.Popen[str]:
    """The sharding commands in a process of their own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **kw.pop("env", {})}
    command = [sys.executable, "-m", "data_tools", *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def run(*args: str | Path | int, code: int = 0, **kw) -> str:
    """Runs a command to its end, checks its exit code and returns what it said."""
    process = start(*args, **kw)
    out, error = process.communicate(timeout=300)
    assert process.returncode == code, out + error
    return out + error


def wait_until(condition, process: subprocess.Popen[str] | None = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def markers(out: Path) -> int:
    return len(list((out / "plan").glob("*.done.json")))
