"""A node's cache as the node's first rank holds it: the folder, the lock on it, and the prefetcher's process.

The folder is named after host, run and rank, so that a start after a crash finds what the last one left, and nodes that
share `data.cache_dir` have one each; folders of other runs that ended without tidying up are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from data_tools.errors import UserError
from pipeline.data.cache import BEAT, CacheReader
from pipeline.data.order import Order
from pipeline.data.prefetch import PROGRESS, Job, Member, Plan
from pipeline.data.source import SampleSource, TarSource
from pipeline.data.store import is_network_mount
from pipeline.sizes import parse_bytes

if TYPE_CHECKING:
    from pipeline.config import Config

_PREFIX = "mixer-cache-"
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds before another prefetcher is started
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def cache_root(folder: str | None) -> Path:
    """Where caches lie: `data.cache_dir`, else the system's folder for temporary files (TMPDIR)."""
    return Path(folder or tempfile.gettempdir())


def cache_folder(root: Path, run_id: str, first_rank: int) -> Path:
    """The cache of the node whose first rank is `first_rank`: known to all ranks of the node without talking."""
    return root / f"{_PREFIX}{socket.gethostname()}-{run_id[:12]}-{first_rank}"


def cache_limit(root: Path, size: int | None, needed: int) -> int:
    """The hard limit in bytes: data.cache_size, else half of what is free on the disk.

    Raises:
        UserError: it is below the working set; or it is not said, and the folder is one that nodes share.
    """
    if size is None and is_network_mount(root):
        raise UserError(
            f"data.cache_dir={root} lies on a network file system, of which half is not this node's to take: "
            "choose a folder on a disk of the node, or set data.cache_size to what each node may take"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as e:
        raise UserError(f"data.cache_dir={root}: {e.strerror}; choose a folder on a local disk") from e
    limit = free // 2 if size is None else size
    if limit < needed:
        what = f"half of the free space of {root}" if size is None else "data.cache_size"
        raise UserError(
            f"{what} is {limit / 2**20:,.1f} MiB, but the chunks in use at one time take {needed / 2**20:,.1f} MiB on "
            f"this node: set data.cache_size={-(-needed // 2**20)}MiB or more"
            f"{', or another data.cache_dir' if size is None or free < needed else ''}, or use more nodes; or "
            "data.cache_size=0 to read without a cache"
        )
    return limit


class NodeCache:
    """Starts the prefetcher and keeps it running, until `close`.

    Raises:
        UserError: another process holds the folder.
    """

    def __init__(self, folder: Path, limit: int, plan: Plan, ahead: int):
        self.folder, self._limit, self._plan, self._ahead = folder, limit, plan, ahead
        self._lock = _lock(Path(f"{folder}.lock"))
        if self._lock is None:
            raise UserError(f"{folder}: another process fills this cache; wait for it to end, or stop it")
        _remove_leftovers(folder.parent, keep=folder)
        _make_folder(folder)
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.progress(plan.order.state)

    def start(self, wait: float = 20.0) -> None:
        """Returns when the chunks of the first step are announced (or after `wait` seconds: reading works anyway)."""
        (self.folder / BEAT).unlink(missing_ok=True)
        self._spawn()
        threading.Thread(target=self._watch, name="prefetcher", daemon=True).start()
        end = time.monotonic() + wait
        while not (self.folder / BEAT).exists() and time.monotonic() < end:
            time.sleep(0.01)

    def progress(self, state: Any) -> None:
        """Says that the step at `state` is the next one."""
        temporary = self.folder / f".{PROGRESS}"
        with contextlib.suppress(OSError):  # a full disk: the prefetcher stands still, readers help themselves
            temporary.write_bytes(pickle.dumps(state))
            os.replace(temporary, self.folder / PROGRESS)

    def close(self) -> None:
        """Ends the prefetcher and removes the cache."""
        self._closing.set()
        if self._process:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(f"{self.folder}.lock").unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _spawn(self) -> None:
        job = Job(str(self.folder), self._limit, self._ahead, self._plan, os.getpid())
        path = os.pathsep.join([os.getcwd() if p == "" else p for p in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.data.prefetch"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(pickle.dumps(job))

    def _watch(self) -> None:
        """A prefetcher that was killed is started again; readers go to the store meanwhile.

        One that ends again within a minute is waited for twice as long as the last, up to a minute."""
        pause = _PAUSE
        while not self._closing.is_set():
            process, begun = self._process, time.monotonic()
            assert process is not None
            process.wait()
            if time.monotonic() - begun > _LONGEST_PAUSE:
                pause = _PAUSE
            if self._closing.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE)
            print(f"warning: the prefetcher ended with code {process.returncode}; starting another", flush=True)
            self._spawn()


def _lock(path: Path) -> int | None:
    """A POSIX lock, which ends with this very process: loader workers that outlive it do not hold it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _remove_leftovers(root: Path, keep: Path) -> None:
    """Caches of runs on this host that nobody holds any more."""
    for lock in root.glob(f"{_PREFIX}{socket.gethostname()}-*.lock"):
        folder = lock.with_suffix("")
        if folder == keep:
            continue
        fd = _lock(lock)
        if fd is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(fd)


def _make_folder(folder: Path) -> None:
    """Empties it after a reboot: a file that was renamed shortly before a power cut may hold anything."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    mark = folder / ".boot"
    try:
        same = mark.read_text() == boot
    except OSError:
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # a run's that was killed; but in /tmp, anybody could have made it
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            raise UserError(f"{folder} belongs to somebody else: remove it, or choose another data.cache_dir") from None
    mark.write_text(boot)


class CachePlan:
    """What one node of a run caches, and where; made at the start, before anything slow.

    `read_ahead`: steps that loaders read ahead of the training.

    Raises:
        UserError: the limit is below the working set (told by the node's first rank).
    """

    def __init__(
        self,
        config: Config,
        order: Order,
        source: SampleSource,
        slots: np.ndarray,
        *,
        read_ahead: int,
        first_rank: int,
        local_rank: int,
    ):
        self._config, self._source, self._slots, self._leads = config, source, slots, local_rank == 0
        root = cache_root(config.data.cache_dir)
        run = xxhash.xxh3_64_hexdigest(os.path.abspath(config.run.dir).encode())
        self.folder = cache_folder(root, run, first_rank)
        window = config.data.window
        self._ahead = 2 * window + read_ahead  # a chunk's uses lie within a window, or two: none is missed
        self._limit = 0
        if self._leads:
            size = config.data.cache_size
            needed = self._plan(order).working_set(read_ahead, 3 * window)
            self._limit = cache_limit(root, None if size is None else parse_bytes(size), needed)

    @staticmethod
    def wanted(config: Config, source: SampleSource) -> bool:
        """Is there anything to cache, and is it wished?"""
        size = config.data.cache_size
        return any(_is_remote(s) for s in _parts(source)) and (size is None or parse_bytes(size) > 0)

    def open(self, order: Order) -> NodeCache | None:
        """Lets the source look into the cache; on the node's first rank, also fills it from `order.state` on."""
        plan = self._plan(order)
        for member in plan.members:
            member.source.use_cache(CacheReader(self.folder), member.chunk)
        if not self._leads:
            return None
        cache = NodeCache(self.folder, self._limit, plan, self._ahead)
        cache.start()
        return cache

    def _plan(self, order: Order) -> Plan:
        members, first = [], 0
        state: Any = order.state
        for i, part in enumerate(_parts(self._source)):
            if _is_remote(part):
                chunk = state.sets[i].chunk if hasattr(state, "sets") else state.chunk
                members.append(Member(first, part, chunk))
            first += sum(part.shard_sizes)
        return Plan(order, self._slots, members)


def _parts(source: SampleSource) -> list[Any]:
    return list(getattr(source, "sources", [source]))


def _is_remote(source: Any) -> bool:
    return isinstance(source, TarSource) and source.remote
