"""Who this process is among the others: rank arithmetic, devices and the few collectives the trainer needs, once."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank r of `size`, on `device`. Made by `World.join()`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    group: Any = None  # of the collectives below; None is the whole world's
    timeout_s: float = 1800.0  # until a collective gives up

    @staticmethod
    def join(timeout_s: float = 1800.0) -> World:
        """Joins the process group that torchrun or SLURM describes in the environment; alone otherwise.

        CPU tensors travel by gloo, CUDA tensors by NCCL, in one group.
        """
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ["MASTER_PORT"] = str(free_port())
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        use_cuda = torch.cuda.is_available() and os.environ.get("MIXER_DEVICE", "cuda") != "cpu"
        device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
                timeout=timedelta(seconds=timeout_s),
                device_id=device if use_cuda else None,
            )
        return World(
            dist.get_rank(),
            dist.get_world_size(),
            local_rank,
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            device,
            timeout_s=timeout_s,
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        # An all-reduce on the CPU: NCCL's own barrier would only order the streams
        dist.all_reduce(torch.zeros(1), group=self.group)

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' sum of a CPU tensor, on every rank."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def _reduce(self, values: Sequence[float], op: Any) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        # tensors by the CPU: pickled objects need no trip over the accelerator
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value, group=self.group)
        return boxes

    def beside(self) -> World:
        """The same ranks in a group of their own (gloo), whose collectives do not meet this one's. Collective."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s)))

    def set_timeouts(self) -> None:
        """Gives all groups of this process `timeout_s`: those that libraries make have torch's own (NCCL: 10 min)."""
        for group in dist.distributed_c10d._world.pg_map:  # no public list of them
            group.set_timeout(timedelta(seconds=self.timeout_s))

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
