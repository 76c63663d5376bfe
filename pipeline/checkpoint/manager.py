"""Saving, committing, finding, verifying and pruning the checkpoints of a run.

    RUN/checkpoints/step-00001000/ rank-00000-of-00002.safetensors ... state.json MANIFEST.json
    RUN/checkpoints/LATEST         a hint for people

A checkpoint exists if and only if its MANIFEST.json does: files are synced first, every writer reports size and
hash, the union of pieces is checked, rank 0 writes the manifest last. A folder without one is debris of a crash.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from data_tools.errors import UserError
from pipeline.checkpoint.layout import (
    STATE,
    CheckpointError,
    CheckpointManifest,
    CheckpointReader,
    CheckpointUnreadable,
    FileRecord,
    Key,
    check_coverage,
    write_pieces,
)
from pipeline.checkpoint.place import (
    MANIFEST,
    STEP_NAME,
    committed_steps,
    copy_file,
    is_committed,
    is_local,
    make_folder,
    move,
    names,
    publish,
    read,
    remove_tree,
    step_folder,
    sync_folder,
    withdraw,
    write_durably,
)
from pipeline.parallel.engine import Piece
from pipeline.parallel.world import World

T = TypeVar("T")
READ_PAUSES = (1.0, 5.0)  # seconds after each failed try to read a checkpoint that may be out of reach for a moment


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last`, every multiple of `keep_every` steps, and the best one."""

    keep_last: int = 3
    keep_every: int | None = None

    def obsolete(self, steps: list[int], best: int | None) -> list[int]:
        newest = set(sorted(steps)[-max(1, self.keep_last) :])
        forever = {s for s in steps if self.keep_every and s % self.keep_every == 0}
        return [s for s in steps if s not in newest | forever and s != best]


def score(metrics: dict[str, float], metric: str) -> float | None:
    """The metric as a number of which more is better; None where it was not evaluated."""
    value = metrics.get(metric)
    return -value if value is not None and metric == "loss" else value


def best_score(root: Path, metric: str | None = None) -> tuple[float, int] | None:
    """(`score`, step) of the checkpoint that was evaluated best; the later of equals; None where none was evaluated.

    `metric` None: `checkpoint.best` of the run when it wrote the newest checkpoint.

    Raises:
        CheckpointUnreadable, OSError: one cannot be read now; it may be the best.
    """
    manifests = []
    for step in committed_steps(root):
        try:
            manifests.append(CheckpointManifest.load(step_folder(root, step)))
        except CheckpointUnreadable:
            raise
        except CheckpointError:
            continue
    if not manifests:
        return None
    metric = metric or manifests[-1].written_by.get("best", "top1")
    scores = [(value, m.step) for m in manifests if (value := score(m.metrics, metric)) is not None]
    return max(scores, default=None)


def best_step(root: Path) -> int | None:
    """The step of `best_score`."""
    best = best_score(root)
    return best[1] if best else None


def choose(root: Path, which: str) -> Path:
    """The folder of checkpoint `last`, `best` or `step-N`. Raises CheckpointError naming those that exist."""
    steps = committed_steps(root)
    if not steps:
        raise CheckpointError(f"{root} holds no checkpoint: the run has not saved yet")
    if which == "last":
        return step_folder(root, steps[-1])
    if which == "best":
        best = best_step(root)
        if best is None:
            raise CheckpointError(f"no checkpoint in {root} was evaluated during training; use --checkpoint last")
        return step_folder(root, best)
    match = re.fullmatch(r"(?:step-)?(\d+)", which)
    if match and int(match[1]) in steps:
        return step_folder(root, int(match[1]))
    known = ", ".join(f"step-{s}" for s in steps)
    raise CheckpointError(f"no checkpoint '{which}' in {root}; there are: last, best, {known}")


def remove_checkpoint(folder: Path) -> None:
    withdraw(folder)  # first: a half-deleted folder must not look like a checkpoint
    remove_tree(folder)


class CheckpointManager:
    """The checkpoints of one run, seen from every rank at once: all methods are collective."""

    def __init__(self, root: Path, world: World, retention: Retention, mirror: Path | None = None):
        self.root, self.world, self.retention, self.mirror = root, world, retention, mirror
        if world.is_main:
            make_folder(root)

    def save(
        self,
        step: int,
        tensors: dict[Key, tuple[int, ...]],
        pieces: Iterable[Piece],
        state: dict[str, Any],
        *,
        metrics: dict[str, float],
        written_by: dict[str, Any],
    ) -> float:
        """Writes and commits one checkpoint; returns the seconds it took. Every rank passes its own pieces.

        Raises:
            CheckpointError: on every rank, if any rank failed; nothing is committed then and nothing was pruned.
        """
        started = time.perf_counter()
        folder = step_folder(self.root, step)
        name = f"rank-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        try:
            self._together(lambda: self._prepare(folder) if self.world.is_main else None)
            records = self._together(lambda: write_pieces(folder / name, pieces))
            self._together(
                lambda: (
                    self._commit(folder, step, tensors, records, state, metrics, written_by)
                    if self.world.is_main
                    else None
                )
            )
        except Exception:  # also a collective's: a rank was too late
            with contextlib.suppress(OSError):
                if self.world.is_main and not is_committed(folder):
                    remove_tree(folder)  # a full disk must not stay full of debris
            raise
        return time.perf_counter() - started

    def copy_to_mirror(self, step: int) -> None:
        """Copies a committed checkpoint to the mirror, the manifest last. Every rank copies the file it wrote.

        Raises:
            CheckpointError: on every rank, if any rank failed.
        """
        if self.mirror is None:
            return
        source, target = step_folder(self.root, step), step_folder(self.mirror, step)
        mine = f"rank-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        self._together(lambda: make_folder(target))
        self._together(lambda: copy_file(source / mine, target / mine))

        def commit() -> None:
            copy_file(source / STATE, target / STATE)
            publish(target / MANIFEST, read(source / MANIFEST))
            self._prune(target.parent)

        self._together(lambda: commit() if self.world.is_main else None)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Runs `work` on every rank and returns all results; a failure anywhere is raised everywhere."""
        try:
            outcome: tuple[Any, str | None] = work(), None
        except Exception as e:
            outcome = None, f"rank {self.world.rank}: {e}"
        outcomes = self.world.gather(outcome)
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            raise CheckpointError("; ".join(failures[:3]))
        return [result for result, _ in outcomes]

    def _prepare(self, folder: Path) -> None:
        if folder.exists():  # debris of a crash, or a step that is saved again after walking back
            withdraw(folder)
            remove_tree(folder)
        make_folder(folder)

    def _commit(
        self,
        folder: Path,
        step: int,
        tensors: dict[Key, tuple[int, ...]],
        files: list[FileRecord],
        state: dict[str, Any],
        metrics: dict[str, float],
        written_by: dict[str, Any],
    ) -> None:
        check_coverage(tensors, files)
        text = json.dumps(state, indent=1).encode()
        write_durably(folder / STATE, [text])
        manifest = CheckpointManifest(step, tensors, files, xxhash.xxh3_128_hexdigest(text), metrics, written_by)
        sync_folder(folder)
        publish(folder / MANIFEST, manifest.to_json().encode())
        sync_folder(self.root)
        # From here on the checkpoint exists: what fails now is housekeeping, and tried again after the next save
        with contextlib.suppress(OSError, CheckpointUnreadable):
            publish(self.root / "LATEST", folder.name.encode() + b"\n")
            self._prune(self.root)

    def _prune(self, root: Path) -> None:
        for step in self.retention.obsolete(committed_steps(root), best_step(root)):
            remove_checkpoint(step_folder(root, step))

    def check_shared(self) -> None:
        """Every rank has to see what another one writes. A mirror that is out of reach is left to `copy_to_mirror`.

        Raises:
            UserError: a folder is of each node's own: no checkpoint in it would ever be whole.
        """
        for root in filter(is_local, self._roots):
            token = self.world.broadcast(_leave_token(root) if self.world.is_main else None)
            if token is None:
                continue
            seen = self.world.gather((_appears(root / token), socket.gethostname()))
            if self.world.is_main:
                with contextlib.suppress(OSError):
                    (root / token).unlink()
            blind = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(seen) if not sees]
            if blind:
                raise UserError(
                    f"{root} is not the same folder on all nodes: {', '.join(blind[:3])} cannot see what rank 0 on "
                    f"{seen[0][1]} wrote there; give checkpoint.dir and checkpoint.mirror a shared folder or a store"
                )

    def clean(self) -> None:
        """Removes folders that a crash left without a manifest. Only at a start, when nobody is writing."""
        for root in self._roots if self.world.is_main else []:
            with contextlib.suppress(OSError):  # out of reach: at another start
                for name in names(root):
                    if STEP_NAME.fullmatch(name) and not is_committed(root / name):
                        remove_tree(root / name)
        self.world.barrier()

    def newest_good(self, warn: Callable[[str], None]) -> CheckpointReader | None:
        """The newest checkpoint whose files are whole, walking back over damaged ones; None where none exists.

        Ranks share the hashing; rank 0 says which checkpoint is looked at, so all take the same one.

        Raises:
            CheckpointError: checkpoints exist, but not one of them is whole; or they cannot be read now.
        """
        folders = self._together(lambda: self._newest_first(warn) if self.world.is_main else [])[0]
        damaged: list[tuple[Path, str]] = []
        for folder in folders:
            damage = self._damage(folder)
            if damage is None:
                if self.world.is_main:
                    for broken, why in damaged:
                        # Out of the way: retention would count it and prune a good one instead
                        try:
                            aside = f"set aside as {move(broken, f'damaged-{broken.name}-{time.time_ns()}').name}"
                        except OSError as e:
                            aside = f"cannot be set aside now ({e})"
                        warn(f"checkpoint {broken} is damaged and {aside}: {why}")
                return CheckpointReader(folder)
            damaged.append((folder, damage))
        if damaged:  # a start from the beginning must be somebody's decision
            raise CheckpointError(
                f"no checkpoint in {self.root} is whole ({len(damaged)} were tried; the newest: {damaged[0][1]}); "
                "restore one from a copy, or move the folder away to start from the beginning"
            )
        return None

    @property
    def _roots(self) -> list[Path]:
        return [self.root, *([self.mirror] if self.mirror else [])]

    def _newest_first(self, warn: Callable[[str], None]) -> list[Path]:
        """All checkpoints here and on the mirror; of one step, the one here first.

        Raises:
            OSError: they cannot be listed now. Of the mirror it is a warning, where there are checkpoints here.
        """
        found: list[tuple[int, int, Path]] = []
        for i, root in enumerate(self._roots):
            try:
                steps = _retried(functools.partial(committed_steps, root))
                found += [(-step, i, step_folder(root, step)) for step in steps]
            except OSError as e:
                if not found:  # a start from the beginning must be somebody's decision
                    raise OSError(f"{root} cannot be read now ({e}); mend that and start again") from e
                warn(f"the mirror {root} cannot be read now, only the checkpoints in {self.root} are looked at: {e}")
        return [folder for _, _, folder in sorted(found, key=lambda f: f[:2])]

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same on all ranks, or None.

        Raises:
            CheckpointError: it cannot be read now. It may be whole, so nobody must go on from an older one.
        """
        try:
            mine, unreadable = _retried(lambda: self._my_damage(folder)), None
        except OSError as e:
            mine, unreadable = None, str(e)
        found = self.world.gather((mine, unreadable))
        reason = next((u for _, u in found if u), None)
        if reason:
            raise CheckpointError(f"{folder} cannot be read now ({reason}); mend that and start again")
        return next((d for d, _ in found if d), None)

    def _my_damage(self, folder: Path) -> str | None:
        try:
            reader = CheckpointReader(folder)
            reader.state()
            return reader.damage(reader.manifest.files[self.world.rank :: self.world.size])
        except CheckpointUnreadable as e:
            raise OSError(str(e)) from e
        except CheckpointError as e:
            return str(e)


def _leave_token(root: Path) -> str | None:
    """The name of a new file there; None where nothing can be written now."""
    name = f".seen-by-all-{secrets.token_hex(8)}"
    try:
        make_folder(root)
        publish(root / name, b"")
    except OSError:
        return None
    return name


def _appears(path: Path) -> bool:
    """Whether it exists; a network file system may take a moment to show it, longer where it was asked before."""
    with contextlib.suppress(OSError):
        make_folder(path.parent)  # NFS forgets by it that the folder was not there when a launcher looked
    for pause in (0.0, 0.1, 0.5, 2.0, 5.0):
        time.sleep(pause)
        with contextlib.suppress(OSError):
            if path.exists():
                return True
    return False


def _retried(work: Callable[[], T]) -> T:
    """What `work` returns; tried again while it raises OSError, which may be over in a moment."""
    for pause in READ_PAUSES:
        try:
            return work()
        except OSError:
            time.sleep(pause)
    return work()
