"""How long packing will take here: a few images are read and checked as packing would."""

from __future__ import annotations

import time
from pathlib import Path

from data_tools.images import BadImage, check_image
from data_tools.plan import ShardPlan
from data_tools.plan_store import read_slice
from data_tools.reading import Inputs, SampleReader
from data_tools.transform import convert, converts

_SECONDS = 2.0
_IMAGES = 100


def estimate_seconds(plan: ShardPlan, folder: Path, inputs: Inputs) -> float:
    """Seconds for the whole plan (lying in `folder`) in one process, from images of its first shard."""
    options = plan.options
    samples = read_slice(folder, plan.shards[0], inputs.prefixes)[:_IMAGES]
    begin, done = time.perf_counter(), 0
    with SampleReader(inputs) as reader:
        for sample in samples:
            try:
                data = reader.read(sample)
                info = check_image(data, options.max_pixels, options.verify and not converts(options))
                if converts(options):
                    convert(data, info, options)
            except BadImage:
                pass
            done += 1
            if time.perf_counter() - begin > _SECONDS:
                break
    return (time.perf_counter() - begin) / max(done, 1) * plan.corpus.samples
