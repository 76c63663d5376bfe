"""Saving and loading a whole training state, beside the raw disk, torch.distributed.checkpoint and DeepSpeed.

    python benchmarks/bench_checkpoint.py                      # Mixer-H/14, 5.2 GB of state, 2 processes, ~12 GiB
    python benchmarks/bench_checkpoint.py --model mixer_b16    # a small one, to see that it runs

Three process groups, one after the other: this project under FSDP, torch.distributed.checkpoint on the same engine,
DeepSpeed's own under ZeRO-3. In each, every repetition also times the raw disk (each process writes its share of the
same bytes and syncs, then reads it back), so that everybody is compared with the disk of the same minute. Every file
of everybody is synced inside the timing of a save; before every load the page cache is dropped for its files. Best of
the repetitions, after a first save that does not count: the question is what a long training pays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

_COPIED = 512 << 20  # bytes of a rank's state, to see how fast memory is

THRESHOLDS = (
    "thresholds: stall <= 5% of the save; background write >= 70% and load >= 70% of raw; no slower than others"
)


class Group:
    """What the ranks of one process group time together: rank 0 keeps the best of every figure."""

    def __init__(self, folder: Path):
        from pipeline.parallel.world import World

        self.world = World.join()
        self.folder = folder
        self.best: dict[str, float] = {}

    def time(self, name: str, action: Callable[[], Any], keep: bool = True) -> float:
        """Seconds from the moment all ranks are there until all are done."""
        self.world.barrier()
        begin = time.perf_counter()
        action()
        self.world.barrier()
        seconds = time.perf_counter() - begin
        if keep:
            self.note(name, seconds)
        return seconds

    def note(self, name: str, seconds: float) -> None:
        self.best[name] = min(seconds, self.best.get(name, float("inf")))

    def sync(self, folder: Path) -> None:
        """Every file to the disk, the ranks share the work."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        self.world.barrier()
        for path in files[self.world.rank :: self.world.size]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    def drop_cache(self, folder: Path) -> None:
        """Reads after this come from the disk. Files must be synced."""
        self.world.barrier()
        if self.world.is_main:
            for path in folder.rglob("*"):
                if path.is_file():
                    fd = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(fd)
        self.world.barrier()

    def fresh(self, name: str) -> Path:
        path = self.folder / name
        if self.world.is_main:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        self.world.barrier()
        return path

    def remove(self, path: Path) -> None:
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(path)
        self.world.barrier()

    def raw(self, buffers: list[memoryview]) -> None:
        """The disk itself: this rank's bytes written and synced, then read back past the cache."""
        folder = self.fresh("raw")
        path = folder / f"{self.world.rank}.bin"

        def write() -> None:
            with open(path, "wb", buffering=0) as f:
                for buffer in buffers:
                    at = 0
                    while at < len(buffer):
                        at += f.write(buffer[at : at + (8 << 20)])
                os.fsync(f.fileno())

        def read() -> None:
            block = memoryview(bytearray(8 << 20))
            with open(path, "rb", buffering=0) as f:
                while f.readinto(block):
                    pass

        self.time("raw write", write)
        self.drop_cache(folder)
        self.time("raw read", read)
        self.remove(folder)

    def copy(self, buffers: list[memoryview]) -> None:
        """The memory itself: how long copying this rank's bytes takes at least, from a part of them."""
        part = [b for b, _ in zip(buffers, accumulate(map(len, buffers), initial=0)) if _ < _COPIED]
        target = bytearray(sum(map(len, part)))

        def copy() -> None:
            at = 0
            for block in part:
                target[at : at + len(block)] = block
                at += len(block)

        copy()
        share = sum(map(len, buffers)) / len(target)
        self.world.barrier()
        begin = time.perf_counter()
        copy()
        self.note("copy", max(self.world.gather(time.perf_counter() - begin)) * share)

    def report(self, buffers: list[memoryview], **more: Any) -> None:
        total = int(self.world.sum([sum(map(len, buffers))])[0])
        if self.world.is_main:
            print("RESULT " + json.dumps({"bytes": total, **self.best, **more}), flush=True)
        self.world.leave()


def peak_reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """VmHWM (peak since the reset) or VmRSS of this process, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def make_engine(group: Group, model_name: str, strategy: str) -> Any:
    """The project's own engine with moments: FSDP without computing a step, as zero gradients do for an update."""
    import torch

    from pipeline.data.loader import Batch
    from pipeline.losses import make_loss
    from pipeline.model import create_model
    from pipeline.optim import param_groups
    from pipeline.parallel.engine import EngineOptions
    from pipeline.parallel.engine import make_engine as make

    model = create_model(model_name, 1000, 224, device="meta")
    options = EngineOptions(strategy, "fp32", 8, 1, 1, (0.9, 0.999), 1e-8, 1.0)
    engine = make(model, param_groups(model, 0.1), make_loss("softmax_xent"), options, group.world)
    if strategy == "fsdp":
        for p in engine.model.parameters():
            p.grad = torch.zeros_like(p)
        engine._update(0.0)
    else:
        pixels, none = torch.zeros(1, 3, 224, 224, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
        engine.warm_up(Batch(pixels, none, torch.zeros(1), torch.ones(1, 0), none - 1, none, []))
    return engine


def fill(engine: Any) -> list[memoryview]:
    """Random numbers in all pieces (zeros would be cheated with); the bytes that this rank answers for."""
    import torch

    from pipeline.checkpoint.layout import tensor_bytes

    with torch.no_grad():
        for i, piece in enumerate(engine.pieces()):
            piece.data.uniform_(generator=torch.Generator().manual_seed(i))
    return [tensor_bytes(p.data) for p in engine.owned() if p.data.numel()]


def rank_ours(group: Group, model_name: str, repeats: int) -> None:
    from pipeline.checkpoint.layout import load_pieces
    from pipeline.checkpoint.manager import CheckpointManager, Retention
    from pipeline.checkpoint.place import step_folder
    from pipeline.checkpoint.stager import BackgroundSaver

    engine = make_engine(group, model_name, "fsdp")
    buffers = fill(engine)
    own = sum(map(len, buffers))
    root = group.fresh("ours")
    # Removing the older one takes its time too, but after the commit: it is kept here, as the others' are
    manager = CheckpointManager(root, group.world, Retention(2))
    saver = BackgroundSaver(manager, group.world)
    saver.prepare(engine.owned())
    shares, worst = [], {"save": 0, "load": 0}

    def save(step: int) -> tuple[float, float]:
        """(stall, whole) in seconds."""
        group.world.barrier()
        begin = time.perf_counter()
        saver.save(step, engine.owned(), tensors=engine.tensors(), state={}, metrics={}, written_by={})
        stall = time.perf_counter() - begin
        result = saver.wait()
        assert result and not result.error, result
        seconds = group.world.gather(time.perf_counter() - begin)
        return max(group.world.gather(stall)), max(seconds)

    def load() -> None:
        reader = manager.newest_good(warn=print)
        assert reader
        load_pieces(engine.pieces(), reader)
        engine.finish_load(1)

    save(1)
    for repeat in range(repeats):
        group.raw(buffers)
        group.copy(buffers)
        if repeat:
            group.remove(step_folder(root, repeat))
        resident = memory("VmRSS")
        peak_reset()
        stall, whole = save(repeat + 2)
        worst["save"] = max(worst["save"], memory("VmHWM") - resident)
        group.note("save", whole)
        group.note("stall", stall)
        group.note("background", whole - stall)
        shares.append(stall / whole)
        group.drop_cache(root)
        resident = memory("VmRSS")
        peak_reset()
        group.time("load", load)
        worst["load"] = max(worst["load"], memory("VmHWM") - resident)
    group.report(buffers, own=own, share=min(shares), grown={k: max(group.world.gather(v)) for k, v in worst.items()})


def rank_dcp(group: Group, model_name: str, repeats: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    engine = make_engine(group, model_name, "fsdp")
    buffers = fill(engine)
    model_state, optimizer_state = get_state_dict(engine.model, engine._optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}

    def save(folder: Path) -> None:
        dcp.save(state, checkpoint_id=folder)
        group.sync(folder)

    def save_beside(folder: Path) -> None:
        begin = time.perf_counter()
        future: Any = dcp.async_save(state, checkpoint_id=folder)
        group.note("stall", time.perf_counter() - begin)
        future.result()
        group.sync(folder)

    for _ in range(repeats):
        group.raw(buffers)
        for name, way in (("save", save), ("async", save_beside)):
            folder = group.fresh(name)
            group.time(name, lambda way=way, folder=folder: way(folder))
            if name == "save":
                group.drop_cache(folder)
                group.time("load", lambda folder=folder: dcp.load(state, checkpoint_id=folder))
            group.remove(folder)
    group.report(buffers)


def rank_deepspeed(group: Group, model_name: str, repeats: int) -> None:
    engine = make_engine(group, model_name, "zero3")
    buffers = fill(engine)
    deepspeed = engine._engine

    def save(folder: Path) -> None:
        deepspeed.save_checkpoint(str(folder), tag="step", save_latest=False)
        group.sync(folder)

    written = 0
    for _ in range(repeats):
        group.raw(buffers)
        folder = group.fresh("deepspeed")
        group.time("save", lambda folder=folder: save(folder))
        group.drop_cache(folder)
        group.time("load", lambda folder=folder: deepspeed.load_checkpoint(str(folder), tag="step"))
        written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        group.remove(folder)
    group.report(buffers, written=written)


ROLES = {"ours": rank_ours, "dcp": rank_dcp, "deepspeed": rank_deepspeed}


def run_group(role: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from pipeline.parallel.world import free_port

    environment = {
        **os.environ, "WORLD_SIZE": str(args.ranks), "LOCAL_WORLD_SIZE": str(args.ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "MIXER_DEVICE": "cpu", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }  # fmt: skip
    command = [sys.executable, __file__, "--role", role, "--model", args.model, "--repeats"]
    command.append(str(args.repeats if role == "ours" else args.others))
    command += ["--scratch", str(folder)]
    ranks = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(args.ranks)
    ]
    outputs = [r.communicate()[0] for r in ranks]
    if any(r.returncode for r in ranks):
        raise SystemExit(f"a rank of {role} failed:\n" + "\n".join(outputs))
    line = next(line for line in outputs[0].splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def table(found: dict[str, dict[str, Any]]) -> str:
    ours, dcp, deepspeed = (found[role] for role in ROLES)

    def row(what: str, group: dict[str, Any], name: str, raw: str, note: str = "") -> str:
        seconds, bare = group[name], group[f"raw {raw}"]
        rate = group["bytes"] / 1e9
        return f"| {what} | {seconds:.2f} | {rate / seconds:.2f} | {rate / bare:.2f} | {bare / seconds:.0%} | {note} |"

    size = f"{deepspeed['written'] / 1e9:.1f} GB in files"
    rows = [
        row("this project, from call to commit", ours, "save", "write", f"stall {ours['stall']:.3f} s"),
        row("this project, the part in the background", ours, "background", "write"),
        row("torch.distributed.checkpoint.save", dcp, "save", "write"),
        row("torch.distributed.checkpoint.async_save", dcp, "async", "write", f"stall {dcp['stall']:.3f} s"),
        row("DeepSpeed save_checkpoint", deepspeed, "save", "write", size),
        row("this project, load with verification", ours, "load", "read"),
        row("torch.distributed.checkpoint.load", dcp, "load", "read"),
        row("DeepSpeed load_checkpoint", deepspeed, "load", "read", "as pickles"),
    ]
    head = ["| | s | GB/s | raw disk, GB/s | of raw | |", "|---|---|---|---|---|---|"]
    grown = " and ".join(f"{grown / 2**20:,.0f} MiB while it {what}s" for what, grown in ours["grown"].items())
    tail = (
        f"\n{ours['bytes'] / 1e9:.2f} GB of state. Stall of the loop: {ours['share']:.1%} of the save, "
        f"{ours['stall'] / ours['copy']:.2f} times what copying the same bytes takes. A rank holds "
        f"{ours['own'] / 2**20:,.0f} MiB of shards and as much staging; above these its memory grew by {grown}."
    )
    return "\n".join([*head, *rows, tail])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mixer_h14")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure; the default is the system's")
    parser.add_argument("--others", type=int, default=3, help="repetitions of the other systems' saves and loads")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        from pipeline.cli import quiet_libraries

        quiet_libraries()
        with contextlib.suppress(BrokenPipeError):
            ROLES[args.role](Group(args.scratch), args.model, args.repeats)
        return
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.scratch) as scratch:
        found = {}
        for role in ROLES:
            begin = time.perf_counter()
            found[role] = run_group(role, args, Path(scratch))
            print(f"{role}: {time.perf_counter() - begin:.0f} s {json.dumps(found[role])}", file=sys.stderr, flush=True)
            shutil.rmtree(Path(scratch) / role, ignore_errors=True)
    print(table(found))
    print(THRESHOLDS)


if __name__ == "__main__":
    main()
