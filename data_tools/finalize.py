"""The last step: from done markers to `dataset.json` and `quarantine.jsonl`."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_tools.errors import UserError
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo
from data_tools.pack import PackedShard, read_marker
from data_tools.plan import ShardPlan
from data_tools.plan_store import PLAN_FOLDER, load_plan
from data_tools.stats import split_stats
from data_tools.storage import write_atomic

QUARANTINE_NAME = "quarantine.jsonl"


class TooManyBad(UserError):
    """More images were quarantined than allowed."""


def finalize(out: Path, max_bad: int | float = 0) -> DatasetManifest:
    """Writes the quarantine list and, unless too many images are bad, the manifest of a fully packed plan.

    `max_bad` is a count, or a fraction of the planned samples where it is a float. Raises UserError where
    shards are missing or counts do not add up, TooManyBad (the list is written, the manifest is not).
    """
    plan = load_plan(out / PLAN_FOLDER)
    if plan is None:
        raise UserError(f"{out} holds no plan; run `mixer shard SOURCE {out}` first")
    packed = [read_marker(out, shard, plan.digest) for shard in plan.shards]
    done = [p for p in packed if p is not None]
    if len(done) < len(packed):
        raise UserError(f"{len(packed) - len(done)} of {len(packed)} shards in {out} are not packed yet")
    _assert_all_accounted_for(out, plan, done)
    bad = sum(len(p.bad) for p in done)
    _write_quarantine(out, done)
    planned = plan.corpus.samples
    if bad > (max_bad * planned if isinstance(max_bad, float) else max_bad):
        allowed = f"{max_bad * 100:g}%" if isinstance(max_bad, float) else str(max_bad)
        first = next(b for p in done for b in p.bad)
        raise TooManyBad(
            f"{bad:,} of {planned:,} images are bad, allowed are {allowed} "
            f"(first: {first.path!r}: {first.reason}).\n"
            f"All are listed in {out / QUARANTINE_NAME}. To accept them, run the same command with "
            f"--max-bad {bad} (nothing is packed again)."
        )
    manifest = _manifest(out, plan, done, bad)
    write_atomic(out / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _assert_all_accounted_for(out: Path, plan: ShardPlan, done: list[PackedShard]) -> None:
    for shard, packed in zip(plan.shards, done):
        if shard.samples != packed.samples + len(packed.bad):
            raise UserError(
                f"{packed.name}: {shard.samples} samples were planned, {packed.samples} written and "
                f"{len(packed.bad)} quarantined; a fault of the program: report it, delete {out}, start again"
            )


def _write_quarantine(out: Path, done: list[PackedShard]) -> None:
    lines = [
        json.dumps({"path": b.path, "reason": b.reason, "shard": p.name}) + "\n" for p in done for b in p.bad
    ]
    path = out / QUARANTINE_NAME
    if lines:
        write_atomic(path, "".join(lines).encode())
    else:
        path.unlink(missing_ok=True)


def _manifest(out: Path, plan: ShardPlan, done: list[PackedShard], bad: int) -> DatasetManifest:
    """Without times and places, so that the same corpus and options give the same manifest."""
    splits: dict[str, list[ShardInfo]] = {}
    for packed in done:
        if packed.samples:
            splits.setdefault(packed.split, []).append(packed.info())
    if not splits:
        raise UserError(f"not one image is good; see {out / QUARANTINE_NAME}")
    return DatasetManifest(
        splits=splits,
        classes=plan.classes,
        source={
            "kind": plan.corpus.kind,
            "samples": plan.corpus.samples,
            "bytes": plan.corpus.bytes,
            "quarantined": bad,
            "ignored": plan.corpus.ignored,
            "digest": plan.corpus.digest,
            "plan": plan.digest,
            "options": asdict(plan.options),
        },
        stats={split: split_stats(out, shards) for split, shards in splits.items()},
        tool_version=_tool_version(),
    )


def _tool_version() -> str:
    try:
        return version("mixer-pretraining")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
