"""`train.micro_batch_size=auto`: the largest micro-batch that fits, found by trying.

Every rank starts a process of its own for the trial; these form a group like the training's, build the same engine
and take steps of 1, 2, 4, ... images until one of them runs out of memory. What all of them had managed until then is
the answer. A rank that fails in the middle of a collective leaves the others stuck in it, and a half-done step leaves
an engine unusable: so it is processes that fail, and the training's own have not begun to use memory yet.
"""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from data_tools.errors import UserError
from pipeline.config import Config, load_config, to_yaml
from pipeline.data.workers import die_with_parent
from pipeline.parallel.world import World, free_port
from pipeline.run import RunFolder, read_lines

EXIT_OUT_OF_MEMORY = 71
SURE = 0.5  # of the free memory: what is expected to need less is not tried
USABLE = 0.85  # of the free memory: the trial may take this much, fragments and evaluation need the rest
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
_FREE = "MIXER_TRIAL_BYTES"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or the host, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def out_of_memory_message(config: Config, step: int, micro_batch_size: int) -> str:
    """What to tell a user whose training ran out of memory after it had begun."""
    t = config.train
    ways = [f"train.micro_batch_size (it is {micro_batch_size})"] if micro_batch_size > 1 else []
    ways += ["data.num_workers (they use host memory)"] if not torch.cuda.is_available() else []
    switches = []
    if t.activation_checkpointing == "none":
        switches.append("train.activation_checkpointing=block")
    if t.strategy in ("ddp", "zero1", "zero2"):
        switches.append("train.strategy=fsdp")
    if t.offload == "none" and t.strategy != "ddp":
        switches.append("train.offload=optimizer")
    parts = ([f"lower {' or '.join(ways)}"] if ways else []) + ([f"set {' or '.join(switches)}"] if switches else [])
    return f"out of memory in step {step + 1}: {', or '.join(parts) or 'take larger devices'}, then `mixer resume`"


def free_memory(world: World) -> int:
    """Bytes that this rank may still take: of its GPU, else its share of the host, of its control group, its limit."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    found = [psutil.virtual_memory().available // world.local_size]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - psutil.Process().memory_info().vms)
    allowed, used = (_group_memory(name) for name in ("memory.max", "memory.current"))
    if allowed is not None and used is not None:
        found.append((allowed - used) // world.local_size)
    return max(0, min(found))


def total_memory(world: World) -> int:
    """Bytes of this rank's GPU, else of its host and control group, whoever uses them."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    whole = psutil.virtual_memory().total
    return min(whole, _group_memory("memory.max") or whole)


def _group_memory(name: str) -> int | None:
    """A figure of this process' control group; None where there is none, or no limit."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return None


def saved_bytes(model: nn.Module, in_chans: int, image_size: int) -> int:
    """Bytes an image leaves behind in a forward pass for the backward pass, in fp32; nothing is computed on meta."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t
        return t

    device = next(model.parameters()).device
    images = torch.zeros(2, in_chans, image_size, image_size, device=device)  # two: BatchNorm takes no single one
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = model(images)
    del outputs
    return sum(t.untyped_storage().nbytes() for t in kept.values()) // 2


@dataclass(frozen=True)
class Found:
    """A micro-batch and how it was found: it `fits` by far, was `tried`, or `remembered` from an earlier start."""

    size: int
    how: str


def find_micro_batch(config: Config, world: World, model: nn.Module, largest: int, state_bytes: int) -> Found:
    """The micro-batch of every rank, at most `largest` images (a rank's whole share). Collective.

    Raises:
        UserError: not even one image fits.
    """
    run = RunFolder(config.run.dir)
    facts = _facts(config, world, largest)
    known = None
    if world.is_main:
        earlier = [e for e in read_lines(run.events) if e["event"] == "micro_batch" and e["facts"] == facts]
        known = earlier[-1]["size"] if earlier else None
    known = world.broadcast(known)
    if known:
        return Found(known, "remembered")
    image = saved_bytes(model, config.model.in_chans, config.model.image_size)
    # Twice what is kept: gradients and intermediate results live beside it for a while
    sure = state_bytes + 2 * largest * image < SURE * free_memory(world)
    if all(world.gather(sure)):
        return Found(largest, "fits")
    if world.is_main:
        print("trying which micro-batch fits (train.micro_batch_size=auto)", flush=True)
    fits = _try(config, world, largest)
    if not fits:
        raise UserError(
            "not even one image at a time fits into memory: "
            + out_of_memory_message(config, 0, 1).partition(": ")[2].replace(", then `mixer resume`", "")
        )
    size = math.ceil(largest / math.ceil(largest / fits))  # as many micro-steps, no padding in the last
    if world.is_main:
        run.record("micro_batch", size=size, fits=fits, facts=facts)
    return Found(size, "tried")


def _facts(config: Config, world: World, largest: int) -> dict[str, Any]:
    """What the answer depends on. Collective."""
    t = config.train
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    memory = round(min(world.gather(total_memory(world))) / 2**30)
    return {
        "device": device, "memory_gib": memory, "world_size": world.size, "local_size": world.local_size,
        "largest": largest,
        "strategy": t.strategy, "shard_size": t.shard_size, "reshard": t.reshard_after_forward, "offload": t.offload,
        "precision": t.precision, "activation_checkpointing": t.activation_checkpointing, "ema": bool(t.ema_decay),
    }  # fmt: skip


def _try(config: Config, world: World, largest: int) -> int:
    """Runs the trial; the largest size that every rank managed, 0 for none."""
    port = world.broadcast(free_port() if world.is_main else None)
    with tempfile.TemporaryDirectory(prefix="mixer-trial-") as scratch:
        settings = Path(scratch) / "config.yaml"
        settings.write_text(to_yaml(config))
        output = Path(scratch) / "output"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
        environment |= {
            "RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.local_rank),
            "LOCAL_WORLD_SIZE": str(world.local_size), "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), _FREE: str(free_memory(world)),
        }  # fmt: skip
        with open(output, "w") as log:
            trial = subprocess.Popen(
                [sys.executable, "-m", "pipeline.micro_batch", str(settings), str(largest), str(os.getpid())],
                env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            codes = _wait(trial, world)
        finally:
            trial.kill()
            trial.wait()
        lines = output.read_text(errors="replace").splitlines()
        fits = max((int(line.split()[1]) for line in lines if line.startswith("fits ")), default=0)
        smallest = min(world.gather(fits))
        if any(codes) and not any(code in (EXIT_OUT_OF_MEMORY, -9) for code in codes):
            tail = "\n".join(lines[-15:])
            raise RuntimeError(f"trying train.micro_batch_size failed, and not for want of memory:\n{tail}")
        return smallest


def _wait(trial: subprocess.Popen[bytes], world: World) -> list[int | None]:
    """Until all trials have ended well, or one has not. Exit codes of all ranks, None for those still at it."""
    while True:
        time.sleep(0.2)
        codes = world.gather(trial.poll())
        if any(codes):
            time.sleep(1.0)  # who failed first, and who only lost its fellow?
            return world.gather(trial.poll())
        if all(code == 0 for code in codes):
            return codes


def _trial(config: Config, largest: int) -> None:
    """The process of one rank: steps of ever more images, a line for each size that all ranks managed."""
    from pipeline.build import build_engine
    from pipeline.cli import quiet_libraries
    from pipeline.data.loader import Share
    from pipeline.inputs import blank_batch
    from pipeline.model import create_model

    quiet_libraries()
    parent = os.getppid()
    world = World.join()
    m = config.model
    model = create_model(m.name, m.num_classes or 0, m.image_size, device="meta", **m.overrides())
    drops = len(model.drop_rates()) if max(model.drop_rates(), default=0) > 0 else 0
    free = int(os.environ[_FREE])
    if world.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, USABLE * free / torch.cuda.get_device_properties(world.device).total_memory)
        )
    else:  # an error in time, rather than a kernel that kills whom it likes
        limit = psutil.Process().memory_info().vms + int(USABLE * free)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    config = replace(config, train=replace(config.train, compile="none"))  # what compiles needs no more memory
    share = Share(0, largest, 1, min(2, largest))
    engine, average = build_engine(config, world, model, share)
    size, first = 1, True
    while True:
        # Two micro-batches where there will be several: gradients of the first are kept then
        steps = min(2, math.ceil(largest / size))
        engine.train_step([blank_batch(config, size, drops)] * steps, 0.0)
        if first:
            average.reserve()
            first = False
        world.barrier()
        if os.getppid() != parent:
            return
        print(f"fits {size}", flush=True)
        if size == largest:
            return
        size = min(2 * size, largest)


def _main() -> int:
    die_with_parent()  # its session is its own: no signal of the training's reaches it
    if os.getppid() != int(sys.argv[3]):
        return 0
    config = load_config(sys.argv[1]).config
    try:
        _trial(config, int(sys.argv[2]))
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        print(f"out of memory: {e}", flush=True)
        code = EXIT_OUT_OF_MEMORY
    else:
        code = 0
    sys.stdout.flush()
    os._exit(code)  # fellows may be stuck in a collective with this one; nothing is worth tidying up
    return code


if __name__ == "__main__":
    sys.exit(_main())
