"""Do the processes of this group reach each other, correctly and how fast? Asked once, before the first step."""

from __future__ import annotations

import socket
import time

import torch
import torch.distributed as dist

from pipeline.parallel.world import World

_BYTES, _ROUNDS = 16 << 20, 5


def check_group(world: World) -> float:
    """Sums known values over all ranks, on the device that training uses. Collective.

    Returns the bus bandwidth of an all-reduce in GB/s (2 (R-1)/R times the bytes over the time: comparable with the
    link's own figure for any number of ranks R), of the slowest rank.

    Raises:
        RuntimeError: a rank got another sum than the right one; names its host.
    """
    values = torch.full((_BYTES // 4,), float(world.rank + 1), device=world.device)
    dist.all_reduce(values)
    right = world.size * (world.size + 1) / 2
    wrong = bool((values != right).any().item())
    began = time.perf_counter()
    for _ in range(_ROUNDS if world.device.type == "cuda" else 1):
        dist.all_reduce(values)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / (_ROUNDS if world.device.type == "cuda" else 1)
    rows = world.gather((wrong, seconds, socket.gethostname()))
    bad = [f"rank {rank} on {host}" for rank, (wrong, _, host) in enumerate(rows) if wrong]
    if bad:
        raise RuntimeError(
            f"an all-reduce gives wrong sums at {', '.join(bad)}: look at the network and the GPUs there"
        )
    return round(2 * (world.size - 1) / world.size * _BYTES / max(row[1] for row in rows) / 1e9, 3)
