"""Where a data set is made: planned and packed in a local folder, kept there or moved to an object store.

For `s3://bucket/set` the local folder holds the plan and, one a worker, the shards in work; each is uploaded when it
is committed locally, its done marker last, and then deleted here.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_tools.errors import Interrupted, UserError
from data_tools.manifest import index_name
from data_tools.pack import PackedShard, marker_path
from data_tools.plan_store import PLAN_FOLDER
from data_tools.storage import is_url, lock_folder, remove_leftovers
from data_tools.stores import Store, open_store


@dataclass(frozen=True)
class Output:
    """`folder`: the plan, the lock and what is being packed; `url`: where finished shards go, None to stay there."""

    folder: Path
    url: str | None = None
    storage_options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def at(out: str | Path, storage_options: dict[str, Any] | None = None, work: Path | None = None) -> Output:
        """For a local folder or a URL; `work` is the local folder that a URL needs (default: in the user's cache)."""
        if is_url(out):
            return Output(work or _default_work(str(out)), str(out).rstrip("/"), storage_options or {})
        if work is not None:
            raise UserError(f"--work {work}: only for output to an object store; {out} is a local folder")
        return Output(Path(out), storage_options=storage_options or {})  # for sources that are URLs

    @property
    def place(self) -> str:
        """What to call it in messages."""
        return self.url or str(self.folder)

    @property
    def plan_folder(self) -> Path:
        return self.folder / PLAN_FOLDER

    def store(self) -> Store:
        return open_store(self.url or self.folder, self.storage_options)

    def publish(self, packed: PackedShard) -> None:
        """Moves a locally committed shard to the object store: tar, index, then the marker."""
        if self.url is None:
            return
        store = self.store()
        marker = marker_path(self.folder, packed.name)
        files = [self.folder / packed.name, self.folder / index_name(packed.name)] if packed.samples else []
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda path: store.upload(path, path.name), files))
        store.write(f"{PLAN_FOLDER}/{marker.name}", marker.read_bytes())
        for path in (marker, *files):  # the marker first: what is left after a kill counts as not packed
            path.unlink(missing_ok=True)

    def remove_leftovers(self, shards: Collection[str] | None = None) -> None:
        """Deletes half-written local files: all (needs the exclusive lock), or those of the named shards."""
        names = None
        if shards is not None:
            names = {n for s in shards for n in (s, index_name(s), marker_path(self.folder, s).name)}
        remove_leftovers(self.folder, names)
        remove_leftovers(self.plan_folder, names)


@contextmanager
def alone_in(output: Output) -> Iterator[None]:
    """The only run that writes there; what a killed one left half-written is gone. Raises UserError where another
    one is at it."""
    output.plan_folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(output.folder, output.plan_folder / "lock"), terminated_like_interrupted():
        output.remove_leftovers()
        yield


@contextmanager
def explained(output: Output) -> Iterator[None]:
    """Ctrl-C and trouble with a disk as messages for people."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished shards stay in {output.place}: the same command goes on") from None
    except OSError as e:
        known = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota is used up"}
        what = known.get(e.errno or 0, e.strerror or str(e))
        raise UserError(
            f"{e.filename or output.folder}: {what}; committed shards stay: mend that and run the same command to go on"
        ) from e


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (a scheduler's or a container's way to ask) ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _default_work(url: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = re.sub(r"[^A-Za-z0-9]+", "-", url.split("://", 1)[-1]).strip("-")[-60:]
    return Path(cache) / "mixer" / "shard" / f"{name}-{xxhash.xxh3_64_hexdigest(url.rstrip('/').encode())[:8]}"
