"""Fills a node's cache of chunks: one process a node, shared by its ranks and their loader workers.

The order is a formula, so what the node's ranks will read, when, and for the last time, is known. Chunks are fetched in
the order of their first use, up to `ahead` steps before it; those that no step ahead needs any more are deleted when
their room is needed, the longest unneeded first. The folder never holds more bytes than the limit.

    python -m pipeline.data.prefetch      a `Job` on stdin; ends with its parent, or with its folder

Progress comes through a file of the folder, replaced after each step. Nothing depends on this process: if it dies,
`pipeline.data.node_cache` starts another, which goes on with the files that are there. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.errors import UserError
from pipeline.data.cache import BEAT, chunk_name, pack_chunk, packed_size
from pipeline.data.order import Order
from pipeline.data.source import BadSample, TarSource

PROGRESS = "progress"
_THREADS = 32  # requests in flight: a store answers each after tens of milliseconds
_IN_FLIGHT = 512 << 20  # bytes in memory, where chunks are large
_BLOCK = 4096  # files take whole blocks of the disk
_OWN_BYTES = 8 * _BLOCK  # the small files beside the chunks
_INDEX_BYTES = 256 << 20
_POLL = 0.02
_BEAT = 0.1  # seconds between two beats
_SOON, _QUEUED = 8, 1024  # further than so many steps is planned only while fewer chunks than that wait
_MOST_CHUNKS = 1 << 32  # of a shard


class Member(NamedTuple):
    """A remote set of the run's data: its samples are `first_id` and following; chunks of `chunk` samples."""

    first_id: int
    source: TarSource
    chunk: int


class Chunk(NamedTuple):
    name: str
    member: int
    shard: int
    number: int


@dataclass
class Plan:
    """Which chunks each step needs on this node: pure, the same in every process."""

    order: Order
    slots: np.ndarray  # of the global batch, that this node's ranks read
    members: list[Member]

    def chunks(self, state: Any) -> list[Chunk]:
        """The chunks of the step that begins at `state`, each once, in the order of slots."""
        ids = self.order.sample_ids(state.epoch, state.position + self.slots)
        found = []
        for number, member in enumerate(self.members):
            pairs = self._places(member, ids)
            _, first = np.unique(pairs, return_index=True)
            for s, n in zip(*(x.tolist() for x in np.divmod(pairs[np.sort(first)], _MOST_CHUNKS))):
                found.append(Chunk(chunk_name(member.source.digest, member.chunk, s, n), number, s, n))
        return found

    def working_set(self, read_ahead: int, steps: int) -> int:
        """Bytes that must be held at once for `read_ahead` steps ahead: the most within the first `steps` steps."""
        states = [self.order.state]
        while len(states) < steps + read_ahead:
            states.append(self.order.next_state(states[-1]))
        drawn = [self.order.sample_ids(state.epoch, state.position + self.slots) for state in states]
        change = np.zeros(len(states) + 1, dtype=np.int64)
        for member in self.members:
            places = [np.unique(self._places(member, ids)) for ids in drawn]
            every, step = np.concatenate(places), np.repeat(np.arange(len(states)), [len(p) for p in places])
            chunk, first = np.unique(every, return_index=True)
            last = step[len(step) - 1 - np.unique(every[::-1], return_index=True)[1]]
            size = _estimate(member, *np.divmod(chunk, _MOST_CHUNKS))
            np.add.at(change, np.maximum(0, step[first] - read_ahead), size)
            np.subtract.at(change, last + 1, size)
        return int(np.cumsum(change)[:steps].max()) + _OWN_BYTES

    @staticmethod
    def _places(member: Member, ids: np.ndarray) -> np.ndarray:
        """shard * _MOST_CHUNKS + chunk within it, of those of these samples that are the member's; int64."""
        starts, own = member.source.starts, ids - member.first_id
        own = own[(own >= 0) & (own < starts[-1])]
        shard = np.searchsorted(starts, own, side="right") - 1
        return shard * _MOST_CHUNKS + (own - starts[shard]) // member.chunk


def _estimate(member: Member, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """About how many bytes chunks have on the disk, int64: their shares of their tars."""
    samples, size = member.source.shards.samples[shards], member.source.shards.bytes[shards]
    count = np.minimum(member.chunk, samples - numbers * member.chunk)
    return -(-(size * count // np.maximum(1, samples) + 1024) // _BLOCK) * _BLOCK


@dataclass
class Job:
    folder: str
    limit: int  # bytes
    ahead: int  # steps
    plan: Plan
    parent: int  # pid


class Prefetcher:
    """The cache's books, and the threads that fill it. Everything below is held under `_turn`."""

    def __init__(self, job: Job):
        self.folder, self.ahead, self.plan = Path(job.folder), job.ahead, job.plan
        self.limit = job.limit - _OWN_BYTES
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._gates: dict[int, threading.Condition] = {}  # of the threads that wait for an earlier chunk's room
        self._held: dict[str, int] = {}  # name -> bytes on disk, of chunks that are there or being written
        self._used = 0
        self._unneeded: OrderedDict[str, None] = OrderedDict()  # there, and no step that is planned needs it
        self._last_use: dict[str, int] = {}  # planned chunk -> the last step (counted from this process' start)
        self._ends: dict[int, list[str]] = {}  # step -> chunks whose last use it may be
        self._queue: deque[Chunk] = deque()
        self._waiting: set[str] = set()  # queued or being fetched
        self._states: deque[Any] = deque()  # of the planned steps that are not completed
        self._done = 0  # steps completed
        self._taken = self._admitted = 0  # chunks taken from the queue; those of them whose room is booked
        self._index: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._index_bytes = 0
        self.fetched = self.fetched_bytes = self.evicted = 0
        self._beaten, self._told = 0.0, 0  # when it last beat, and how many chunks it told of
        self._said = False
        for member in self.plan.members:
            member.source.files.timeout = float("inf")  # those who need the data decide when to give up
        self._adopt()

    def start(self) -> None:
        mean = max(int(m.source.shards.bytes.sum()) * m.chunk // int(m.source.starts[-1]) for m in self.plan.members)
        for _ in range(max(2, min(_THREADS, _IN_FLIGHT // mean))):
            threading.Thread(target=self._work, daemon=True).start()

    def advance(self, state: Any) -> None:
        """Steps before the one at `state` are completed: forgets what only they needed, and plans further ahead."""
        with self._turn:
            if state not in self._states:
                self._plan_anew()
                self._states.append(state)
                self._add(self._done, state)
            while self._states[0] != state:
                self._states.popleft()
                for name in self._ends.pop(self._done, ()):
                    if self._last_use.get(name) == self._done:
                        del self._last_use[name]
                        if name in self._held and name not in self._waiting:
                            self._unneeded[name] = None
                self._done += 1
            self._turn.notify_all()

    def plan_further(self) -> bool:
        """Plans one step more; False where enough are planned.

        What is not needed soon is not planned while much is to be fetched: planning takes the threads' turns.
        """
        with self._turn:
            if len(self._states) >= self.ahead or (len(self._states) > _SOON and len(self._queue) > _QUEUED):
                return False
            state = self.plan.order.next_state(self._states[-1])
            self._states.append(state)
            self._add(self._done + len(self._states) - 1, state)
            return True

    def _add(self, step: int, state: Any) -> None:
        for chunk in self.plan.chunks(state):
            name = chunk.name
            if name not in self._last_use and name not in self._waiting:
                if name in self._held:
                    self._unneeded.pop(name, None)
                else:
                    self._announce(name)
                    self._queue.append(chunk)
                    self._waiting.add(name)
            self._last_use[name] = step
            self._ends.setdefault(step, []).append(name)
        self._turn.notify_all()

    def _plan_anew(self) -> None:
        """After a start or a rollback: what is there stays as long as its room is not needed."""
        self._done += len(self._states)
        self._states.clear()
        self._ends.clear()
        self._last_use.clear()
        for chunk in self._queue:
            self._waiting.discard(chunk.name)
            self._withdraw(chunk.name)
        self._queue.clear()
        for name in self._held:
            if name not in self._waiting:
                self._unneeded[name] = None

    # -- the threads ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._turn:
                while not self._queue:
                    self._turn.wait()
                chunk, number = self._queue.popleft(), self._taken
                self._taken += 1
            there = False
            try:
                there = self._fetch(chunk, number)
            except (UserError, BadSample):
                pass  # missing or damaged: whoever needs it reads it itself, and says what is wrong
            except OSError as e:
                self._full(e)
            with self._turn:
                self._wait_for_turn(number)
                self._admit(number)
                self._waiting.discard(chunk.name)
                if not there:
                    self._withdraw(chunk.name)
                elif chunk.name not in self._last_use:
                    self._unneeded[chunk.name] = None
                self._turn.notify_all()

    def _fetch(self, chunk: Chunk, number: int) -> bool:
        """Brings one chunk. False where it is not needed any more."""
        source, c = self.plan.members[chunk.member].source, self.plan.members[chunk.member].chunk
        if chunk.name not in self._last_use:
            return False
        rows = self._rows(chunk)[chunk.number * c : (chunk.number + 1) * c]
        base = int(rows[0]["offset"])
        length = int(rows[-1]["offset"]) + int(rows[-1]["size"]) - base
        size = _on_disk(packed_size(rows, length))
        if not self._make_room(chunk.name, size, number):
            return False
        temporary = self.folder / f".{chunk.name}.tmp"
        try:
            content = pack_chunk(rows, base, source.read_range(chunk.shard, base, length))
            temporary.write_bytes(content)
            os.replace(temporary, self.folder / chunk.name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            with self._turn:
                self._used -= self._held.pop(chunk.name)
            raise
        with self._turn:
            self.fetched += 1
            self.fetched_bytes += len(content)
            if time.monotonic() - self._beaten > _BEAT:
                self.beat()
        return True

    def beat_again(self) -> None:
        """What has arrived since the last beat is told, if anything has."""
        with self._turn:
            if self.fetched > self._told and time.monotonic() - self._beaten > _BEAT:
                self.beat()

    def _wait_for_turn(self, number: int) -> None:
        """Until all chunks taken before have their room. Each waits by itself: dozens woken at once slow all down."""
        if self._admitted < number:
            gate = self._gates[number] = threading.Condition(self._lock)
            while self._admitted < number:
                gate.wait()
            del self._gates[number]

    def _admit(self, number: int) -> None:
        self._admitted = max(self._admitted, number + 1)
        if gate := self._gates.get(self._admitted):
            gate.notify()

    def _rows(self, chunk: Chunk) -> np.ndarray:
        at = chunk.member, chunk.shard
        with self._turn:
            if at in self._index:
                self._index.move_to_end(at)
                return self._index[at]
        rows = self.plan.members[chunk.member].source.load_rows(chunk.shard)
        with self._turn:
            if at not in self._index:
                self._index_bytes += rows.nbytes
            self._index[at] = rows
            while len(self._index) > 1 and self._index_bytes > _INDEX_BYTES:
                self._index_bytes -= self._index.popitem(last=False)[1].nbytes
        return rows

    def _make_room(self, name: str, size: int, number: int) -> bool:
        """Books `size` bytes, in the order in which chunks are needed; waits where they do not fit yet."""
        with self._turn:
            self._wait_for_turn(number)
            while self._used + size > self.limit:
                if self._unneeded:
                    old, _ = self._unneeded.popitem(last=False)
                    (self.folder / old).unlink(missing_ok=True)
                    self._used -= self._held.pop(old)
                    self.evicted += 1
                    continue
                self._turn.wait()
                if name not in self._last_use:
                    return False
            self._held[name] = size
            self._used += size
            self._admit(number)
            return True

    def _full(self, e: OSError) -> None:
        """The disk under the cache is full, or fails: no more than what is there is kept from now on."""
        with self._turn:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                self.limit = max(_BLOCK, min(self.limit, self._used))
            if not self._said:
                print(f"warning: the cache in {self.folder}: {e.strerror}; reading goes on without it", flush=True)
            self._said = True
        time.sleep(1)

    # -- the folder -------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """What an earlier process left: whole chunks are kept, the rest is deleted."""
        for path in self.folder.iterdir():
            if path.name in (BEAT, PROGRESS, ".boot", f".{PROGRESS}"):
                continue
            size = path.stat().st_size
            if path.name.startswith(".") or size == 0 or self._used + _on_disk(size) > self.limit:
                path.unlink(missing_ok=True)
                continue
            self._held[path.name] = _on_disk(size)
            self._used += _on_disk(size)
            self._unneeded[path.name] = None

    def _announce(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.close(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    def _withdraw(self, name: str) -> None:
        """Readers no longer wait for it."""
        path = self.folder / name
        with contextlib.suppress(OSError):
            if name not in self._held and path.stat().st_size == 0:
                path.unlink()

    def beat(self) -> None:
        """Tells readers that chunks arrive, and whom it concerns how many."""
        self._beaten, self._told = time.monotonic(), self.fetched
        facts = {"fetched": self.fetched, "bytes": self.fetched_bytes, "evicted": self.evicted, "held": self._used}
        with contextlib.suppress(OSError):
            temporary = self.folder / f".{BEAT}"
            temporary.write_text(json.dumps(facts))
            os.replace(temporary, self.folder / BEAT)


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # for the training, whose process group this is in
        signal.signal(number, signal.SIG_IGN)
    job: Job = pickle.load(sys.stdin.buffer)
    _die_with(job.parent)
    prefetcher = Prefetcher(job)
    prefetcher.start()
    progress, seen = Path(job.folder) / PROGRESS, -1
    started = False
    while os.getppid() == job.parent:
        try:
            stamp = progress.stat().st_mtime_ns
            if stamp != seen:
                seen = stamp
                prefetcher.advance(pickle.loads(progress.read_bytes()))
        except FileNotFoundError:
            return  # the cache was closed
        if not started:
            prefetcher.beat()  # the first step's chunks are announced
            started = True
        if not prefetcher.plan_further():
            prefetcher.beat_again()
            time.sleep(_POLL)


def _die_with(parent: int) -> None:
    """At once, where the kernel can tell (Linux); else `main` notices."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    main()
