"""Is this node fit to train? Run once on every node before the first step; prints one line of JSON.

`python -m launch.preflight RUN GPUS`. `launch.slurm_job` compares the nodes' lines, names those that are unfit and
leaves them out of the next submission. Whether the nodes reach each other is checked by the training processes
themselves, in the group that they train in (`pipeline.parallel.check`).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from launch.snapshot import code_digest, versions

MARK = "mixer-preflight "
MIN_INODES = 10_000
MIN_SPACE = 1 << 30
MAX_SKEW_SECONDS = 30.0
MIN_SPEED = 0.7  # of the median over nodes
_GEMM, _GEMM_SECONDS, _PATTERN_SHARE = 8192, 1.0, 0.8


def main(arguments: list[str]) -> int:
    run, gpus = Path(arguments[0]), int(arguments[1])
    report: dict[str, Any] = {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "problems": [],
        "versions": {**versions(), "code": code_digest(Path(__file__).resolve().parent.parent)},
    }
    checks = [lambda: check_folder(checkpoint_folder(run)), lambda: check_folder(run)]
    for check in [*checks, *([lambda: check_gpus(gpus, report)] if gpus else [])]:
        try:
            report["problems"] += check()
        except Exception as e:
            report["problems"].append(f"{type(e).__name__}: {e}")
    report["problems"] = list(dict.fromkeys(report["problems"]))
    report["clock"] = time.time()
    print(MARK + json.dumps(report), flush=True)
    return 0


def checkpoint_folder(run: Path) -> Path:
    from pipeline.checkpoint.place import checkpoint_root
    from pipeline.config import load_config

    return checkpoint_root(load_config(str(run / "launch" / "config.yaml"), [f"run.dir={run}"]).config)


def check_folder(folder: Path) -> list[str]:
    """Can this node write, sync, rename and delete there, and is there room? `folder` may be in an object store."""
    name = f".preflight-{socket.gethostname()}-{os.getpid()}"
    block = os.urandom(1 << 20)
    remote = "://" in str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if remote:
            path.write_bytes(block)
        else:
            with open(path, "wb") as f:
                f.write(block)
                f.flush()
                os.fsync(f.fileno())
            path = path.rename(folder / f"{name}.renamed")
        same = path.read_bytes() == block
        path.unlink()
    except OSError as e:
        return [f"cannot write to {folder}: {e.strerror or e}"]
    problems = [] if same else [f"{folder} gave back other bytes than were written"]
    if not remote:
        room = os.statvfs(folder)
        free = room.f_bavail * room.f_frsize
        if free < MIN_SPACE:
            problems.append(f"{folder}: only {free / 1e9:.2f} GB free")
        if room.f_files and room.f_favail < MIN_INODES:  # some file systems have no fixed number
            problems.append(f"{folder}: only {room.f_favail} inodes free")
    return problems


def check_gpus(expected: int, report: dict[str, Any]) -> list[str]:
    """Count, a matrix product with a known result for a second, and a pattern through most of the memory."""
    import torch

    count = torch.cuda.device_count()
    problems = [] if count >= expected else [f"{count} GPUs instead of {expected}"]
    report["tflops"] = []
    for i in range(min(count, expected)):
        try:
            with torch.cuda.device(i):
                report["tflops"].append(round(_gemm_tflops(), 1))
                if not _memory_holds():
                    problems.append(f"GPU {i}: memory gave back other values than were written")
        except Exception as e:
            problems.append(f"GPU {i}: {type(e).__name__}: {str(e).splitlines()[0]}")
        torch.cuda.empty_cache()
    return problems


def _gemm_tflops() -> float:
    """bf16, [n, n] x [n, n]. Raises where the product is wrong."""
    import torch

    a = torch.ones(_GEMM, _GEMM, dtype=torch.bfloat16, device="cuda")
    b = torch.full_like(a, 2.0)
    product = a @ b
    torch.cuda.synchronize()
    if not bool((product == 2.0 * _GEMM).all()):
        raise ArithmeticError("a matrix product is wrong")
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < _GEMM_SECONDS:
        for _ in range(10):
            torch.matmul(a, b, out=product)
        torch.cuda.synchronize()
        steps += 10
    return 2 * _GEMM**3 * steps / (time.perf_counter() - started) / 1e12


def _memory_holds() -> bool:
    import torch

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    words = torch.empty(int(free * _PATTERN_SHARE) // 4, dtype=torch.int32, device="cuda")
    for pattern in (0x55555555, -0x55555556):  # every bit once set, once not
        words.fill_(pattern)
        torch.cuda.synchronize()
        for part in words.split(1 << 28):  # a comparison makes a mask: not one of all the memory
            if not bool((part == pattern).all()):
                return False
    return True


def compare(reports: dict[str, dict[str, Any]], skew: dict[str, float], frozen: dict[str, str]) -> dict[str, list[str]]:
    """node -> what is wrong with it, alone or beside the others; only nodes with something wrong.

    skew: seconds that a node's clock is ahead of the first node's, which may be the one that is wrong: what counts is
    the median. frozen: the versions at submission, which win where the nodes disagree.
    """
    failed = {node: list(report["problems"]) for node, report in reports.items()}
    keys = sorted({key for report in reports.values() for key in report["versions"]})
    for key in keys:
        values = [report["versions"].get(key) for report in reports.values()]
        if len(set(values)) > 1:
            right = frozen.get(key) if frozen.get(key) in values else max(values, key=values.count)
            for node, report in reports.items():
                if report["versions"].get(key) != right:
                    failed[node].append(f"{key} {report['versions'].get(key)}, the others have {right}")
    usual = sorted(skew.values())[(len(skew) - 1) // 2] if skew else 0.0
    for node, seconds in skew.items():
        if abs(seconds - usual) > MAX_SKEW_SECONDS:
            failed[node].append(f"its clock is {seconds - usual:+.0f} s off")
    speeds = sorted(min(r["tflops"]) for r in reports.values() if r.get("tflops"))
    for node, report in reports.items():
        if report.get("tflops") and min(report["tflops"]) < MIN_SPEED * speeds[len(speeds) // 2]:
            slowest = min(report["tflops"])
            failed[node].append(f"a GPU does {slowest} TFLOP/s, the nodes' median is {speeds[len(speeds) // 2]}")
    return {node: problems for node, problems in failed.items() if problems}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
