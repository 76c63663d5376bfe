"""What a finished data set holds, from its indexes alone; no image is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_tools.manifest import ShardInfo, load_index


def split_stats(folder: Path, shards: list[ShardInfo]) -> dict[str, Any]:
    """Counts and sizes of one split: samples, image bytes, class counts (by class index, without -1), and
    smallest, median and largest width and height in pixels."""
    tables = [load_index(folder / s.index_name) for s in shards]
    labels = np.concatenate([t["label"] for t in tables])
    counts = np.bincount(labels[labels >= 0])
    return {
        "samples": len(labels),
        "image_bytes": int(sum(int(t["size"].sum(dtype=np.uint64)) for t in tables)),
        "class_counts": counts.tolist(),
        "width": _spread(np.concatenate([t["width"] for t in tables])),
        "height": _spread(np.concatenate([t["height"] for t in tables])),
    }


def _spread(values: np.ndarray) -> list[int]:
    return [int(v) for v in np.percentile(values, [0, 50, 100], method="lower")]
