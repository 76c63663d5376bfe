"""`mixer doctor`: what of this machine and environment is fit for training, what is missing, what to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_tools.errors import UserError

Level = Literal["ok", "note", "BAD"]
_PACKAGE = "mixer-pretraining"
_OPEN_FILES = 4096
_SHM = 1 << 30  # bytes
_BLOCK, _BLOCKS = 8 << 20, 16  # bytes written for the speed of a disk


@dataclass(frozen=True)
class Finding:
    """One line. "note": only something optional is missing. `todo`: what to do."""

    level: Level
    topic: str
    text: str
    todo: str = ""


def doctor(
    run: Annotated[str | None, typer.Argument(help="Also its data and the place of its checkpoints.")] = None,
) -> None:
    """What of the environment is fit or missing. Exit code 1 if something needed is.

    Run it where you will train: in an allocation, not on the login node.

    Examples:

      mixer doctor

      srun -N1 mixer doctor runs/b16
    """
    bad = 0
    for check in (*CHECKS, *((lambda: _run(run),) if run else ())):
        try:
            for finding in check():
                bad += finding.level == "BAD"
                colour = {"ok": "green", "note": "yellow", "BAD": "red"}[finding.level]
                mark = typer.style(f"{finding.level:<5}", fg=colour)
                typer.echo(f"{mark}{finding.topic:<14}{finding.text}" + (f": {finding.todo}" if finding.todo else ""))
        except UserError:
            raise
        except Exception as e:  # a check that fails is a finding, and the others still count
            bad += 1
            typer.echo(f"BAD  {getattr(check, '__name__', 'run').strip('_'):<14}{type(e).__name__}: {e}")
    if bad:
        raise UserError(f"{bad} of these would stop or spoil a training: mend them first")
    typer.echo("fit to train")


def _python() -> Iterator[Finding]:
    fit = (3, 11) <= sys.version_info < (3, 14)
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    yield Finding("ok" if fit else "BAD", "python", text, "" if fit else "take 3.11, 3.12 or 3.13")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", "host", f"{platform.node()}: {len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB")


def _packages() -> Iterator[Finding]:
    """Versions against what this package asks for."""
    from packaging.requirements import Requirement

    try:
        asked = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("note", "packages", f"{_PACKAGE} itself is not installed, its sources are used as they lie")
        return
    wrong, right = [], 0
    for requirement in map(Requirement, asked):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} (here: {version or 'none'})")
        else:
            right += 1
    if wrong:
        yield Finding("BAD", "packages", f"wrong: {', '.join(wrong)}", f"pip install -U {_PACKAGE}")
    else:
        yield Finding("ok", "packages", f"{right} at the versions asked for")


def _torch() -> Iterator[Finding]:
    import torch

    cuda = torch.version.cuda
    build = f"{torch.__version__}" + (f", built for CUDA {cuda}" if cuda else ", a CPU build")
    if not Path("/dev/nvidiactl").exists():
        yield Finding("ok", "torch", build)
        yield Finding("note", "GPU", "none here: trainings run on the CPU")
        return
    driver, limit = _driver()
    if not cuda:
        yield Finding("BAD", "torch", f"{build}, but here are NVIDIA GPUs", "install torch's CUDA build")
        return
    if not torch.cuda.is_available():
        why = f"the driver ({driver}) takes CUDA up to {limit}" if limit and _older(limit, cuda) else f"driver {driver}"
        yield Finding("BAD", "torch", f"{build}, which cannot use the GPUs: {why}", "a newer driver or an older build")
        return
    from torch.cuda import nccl as nccl_library

    nccl = ".".join(map(str, nccl_library.version()))
    yield Finding("ok", "torch", f"{build}; driver {driver}, NCCL {nccl}")
    from launch.preflight import check_gpus

    report: dict[str, Any] = {}
    problems = check_gpus(torch.cuda.device_count(), report)
    for i in range(torch.cuda.device_count()):
        rate = report["tflops"][i : i + 1]
        speed = f", {rate[0]:.0f} TFLOP/s in bf16" if rate else ""
        memory = torch.cuda.get_device_properties(i).total_memory
        yield Finding("ok", f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {memory / 2**30:.0f} GiB{speed}")
    for problem in problems:
        yield Finding("BAD", "GPU", problem, "leave this machine out")


def _driver() -> tuple[str, str | None]:
    """(driver's version, the newest CUDA it takes) by nvidia-smi."""
    try:
        text = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: nvidia-smi does not answer", None
    version = re.search(r"Driver Version: *([\d.]+)", text)
    cuda = re.search(r"CUDA Version: *([\d.]+)", text)
    return version[1] if version else "unknown", cuda[1] if cuda else None


def _older(a: str, b: str) -> bool:
    return [int(x) for x in a.split(".")[:2]] < [int(x) for x in b.split(".")[:2]]


def _deepspeed() -> Iterator[Finding]:
    """In a process of its own: where it cannot be imported, it can take the process with it."""
    environment = {**os.environ, **({} if Path("/dev/nvidiactl").exists() else {"DS_ACCELERATOR": "cpu"})}
    done = subprocess.run(
        [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "note", "deepspeed", f"cannot be imported ({last})", "zero1 to zero3 cannot run; fsdp and ddp can"
        )
    else:
        yield Finding("ok", "deepspeed", done.stdout.split()[-1])
    compiler, ninja = shutil.which("g++") or shutil.which("c++"), shutil.which("ninja")
    if compiler:
        yield Finding("ok", "compiler", compiler + ("" if ninja else "; no ninja, which ZeRO's offload needs too"))
    else:
        yield Finding("note", "compiler", "none", "train.compile and ZeRO's train.offload need g++; nothing else does")


def _decoding() -> Iterator[Finding]:
    import numpy
    import simplejpeg

    noise = numpy.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=numpy.uint8)
    picture = numpy.ascontiguousarray(noise.repeat(25, 0).repeat(25, 1))  # as large as a photograph, as flat as one
    data = simplejpeg.encode_jpeg(picture, quality=90)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        simplejpeg.decode_jpeg(data)
        count += 1
    rate = count / (time.perf_counter() - started)
    yield Finding(
        "ok", "JPEG", f"simplejpeg {simplejpeg.__version__}: {rate:,.0f} images of 500 x 375 a second and core"
    )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _extras() -> Iterator[Finding]:
    wanted = {
        "s3fs": "s3://",
        "gcsfs": "gs://",
        "adlfs": "abfs://",
        "wandb": "logging.to=[wandb]",
        "ray": "--engine ray",
        "nvidia.nvimgcodec": "data.region_decode",
    }
    there = {name for name in wanted if _is_installed(name)}
    if there:
        yield Finding("ok", "extras", ", ".join(f"{name} ({wanted[name]})" for name in sorted(there)))
    missing = sorted(wanted.keys() - there)
    if missing:
        yield Finding("note", "extras", "not installed: " + ", ".join(f"{name} ({wanted[name]})" for name in missing))


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("note", "SLURM", "no sbatch here", "`mixer launch local` and `mixer launch torchrun` need none")
        return
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=20)
        answer = (done.stdout or done.stderr).strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as e:
        yield Finding("note", "SLURM", f"scontrol does not answer ({e})", "jobs are then resubmitted, not requeued")
        return
    up = any("UP" in line for line in answer)
    yield Finding("ok" if up else "note", "SLURM", answer[0] if answer else "no answer")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= _OPEN_FILES or soft == resource.RLIM_INFINITY
    todo = "" if enough else f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}: workers and shards take one each"
    yield Finding("ok" if enough else "note", "open files", f"{soft:,} (at most {hard:,})", todo)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").exists():
        yield Finding("BAD", "locked memory", f"{locked / 1024:.0f} KiB", "InfiniBand needs `ulimit -l unlimited`")
    shm = os.statvfs("/dev/shm")
    free = shm.f_bavail * shm.f_frsize
    todo = (
        ""
        if free >= _SHM
        else "data workers pass batches through it: enlarge it (containers: --shm-size), or data.num_workers=0"
    )
    yield Finding("ok" if free >= _SHM else "BAD", "/dev/shm", f"{free / 2**30:.1f} GiB free", todo)


CHECKS: list[Callable[[], Iterator[Finding]]] = [
    _python,
    _packages,
    _torch,
    _deepspeed,
    _decoding,
    _extras,
    _slurm,
    _limits,
]


def _run(path: str) -> Iterator[Finding]:
    """Data and the place of the checkpoints of one run, from here."""
    from data_tools.manifest import DatasetManifest
    from launch.preflight import check_folder
    from pipeline.checkpoint.place import checkpoint_root, committed_steps
    from pipeline.cli import existing_run
    from pipeline.config import load_config

    run = existing_run(path)
    config = load_config(str(run.config), [f"run.dir={run.path}"]).config
    root = checkpoint_root(config)
    problems = check_folder(root)
    for problem in problems:
        yield Finding("BAD", "checkpoints", problem)
    if not problems:
        steps = committed_steps(root)
        yield Finding(
            "ok", "checkpoints", f"{root}: writable; " + (f"newest step {steps[-1]}" if steps else "none yet")
        )
        if "://" not in str(root):
            yield from _disk(root)
    sets = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    for one in sets:
        where = one["path"] if isinstance(one, dict) else one
        if where == "synthetic":
            continue
        try:
            manifest = DatasetManifest.load(where)
            yield Finding(
                "ok", "data", f"{where}: {sum(s.samples for s in manifest.splits['train']):,} training images"
            )
        except (UserError, OSError) as e:
            yield Finding("BAD", "data", str(e))


def _disk(folder: Path) -> Iterator[Finding]:
    """How fast a file is written and synced, and whether the file server's clock is ours."""
    block = os.urandom(_BLOCK)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as f:
        started = time.perf_counter()
        for _ in range(_BLOCKS):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        rate = _BLOCK * _BLOCKS / (time.perf_counter() - started)
        os.utime(f.name)
        skew = os.stat(f.name).st_mtime - time.time()
    yield Finding("ok", "disk", f"{rate / 1e6:,.0f} MB/s written and synced ({_BLOCK * _BLOCKS >> 20} MiB)")
    off = abs(skew) > 5
    todo = "set it (chrony, NTP): ages and stalls are told by clocks" if off else ""
    yield Finding("note" if off else "ok", "clock", f"{abs(skew):.1f} s from the file system's", todo)
