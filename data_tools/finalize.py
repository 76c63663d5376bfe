"""The last step: from done markers to `dataset.json`, `quarantine.jsonl` and a contact sheet."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from data_tools.errors import UserError
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo
from data_tools.output import Output
from data_tools.pack import PackedShard
from data_tools.plan import ShardPlan
from data_tools.plan_store import DUPLICATES_NAME, load_plan
from data_tools.sheet import contact_sheet
from data_tools.stats import split_stats
from data_tools.storage import join
from data_tools.stores import Store, load_manifest
from data_tools.tasks import read_markers

QUARANTINE_NAME = "quarantine.jsonl"
SHEET_NAME = "contact-sheet.png"


class TooManyBad(UserError):
    """More images were quarantined than allowed."""


def finalize(output: Output, max_bad: int | float = 0) -> DatasetManifest:
    """Writes the quarantine list and, unless too many images are bad, the contact sheet and the manifest of a fully
    packed plan; the manifest last.

    `max_bad` is a count, or a fraction of the planned samples where it is a float. Raises UserError where
    shards are missing or counts do not add up, TooManyBad (the list is written, the manifest is not).
    """
    plan = load_plan(output.plan_folder)
    if plan is None:
        raise UserError(f"{output.folder} holds no plan; run `mixer shard SOURCE {output.place}` first")
    store = output.store()
    packed = read_markers(store, plan)
    done = [p for p in packed if p is not None]
    if len(done) < len(packed):
        first = next(s.name for s, p in zip(plan.shards, packed) if p is None)
        raise UserError(
            f"{len(packed) - len(done):,} of {len(packed):,} shards in {output.place} are not packed yet "
            f"(the first is {first}); run the packing command again"
        )
    _assert_all_accounted_for(output.place, plan, done)
    _write_quarantine(store, done)
    _copy_duplicates(store, output)
    _assert_few_bad(output, plan, done, max_bad)
    return _publish(store, plan, done)


def _assert_all_accounted_for(place: str, plan: ShardPlan, done: list[PackedShard]) -> None:
    """planned = written + quarantined + duplicates, for every shard and in all."""
    fault = f"; a fault of the program: report it, delete {place}, start again"
    for shard, packed in zip(plan.shards, done):
        if shard.samples != packed.samples + len(packed.bad):
            raise UserError(
                f"{packed.name}: {shard.samples} samples were planned, {packed.samples} written and "
                f"{len(packed.bad)} quarantined{fault}"
            )
    planned, left_out = sum(s.samples for s in plan.shards), left_out_of(plan)
    if plan.corpus.listed != planned + left_out:
        raise UserError(
            f"{plan.corpus.listed} samples are in the corpus, {planned} in shards and {left_out} are duplicates{fault}"
        )


def left_out_of(plan: ShardPlan) -> int:
    """Samples of the corpus that the plan keeps out of the shards: duplicates, and what other sets hold."""
    return plan.corpus.duplicates + plan.corpus.held_out


def _assert_few_bad(output: Output, plan: ShardPlan, done: list[PackedShard], max_bad: int | float) -> None:
    bad, planned = sum(len(p.bad) for p in done), plan.corpus.samples
    if bad <= (max_bad * planned if isinstance(max_bad, float) else max_bad):
        return
    allowed = f"{max_bad * 100:g}%" if isinstance(max_bad, float) else str(max_bad)
    first = next(b for p in done for b in p.bad)
    raise TooManyBad(
        f"{bad:,} of {planned:,} images are bad, allowed are {allowed} "
        f"(first: {first.path!r}: {first.reason}).\n"
        f"All are listed in {join(output.place, QUARANTINE_NAME)}. To accept them, run the same command with "
        f"--max-bad {bad} (nothing is packed again)."
    )


def _write_quarantine(store: Store, done: list[PackedShard]) -> None:
    lines = [json.dumps({"path": b.path, "reason": b.reason, "shard": p.name}) + "\n" for p in done for b in p.bad]
    if lines:
        store.write(QUARANTINE_NAME, "".join(lines).encode())
    elif QUARANTINE_NAME in store.list():
        store.delete([QUARANTINE_NAME])


def _copy_duplicates(store: Store, output: Output) -> None:
    """The list of images that were left out as duplicates, beside the shards."""
    path = output.plan_folder / DUPLICATES_NAME
    if path.exists():
        store.write(DUPLICATES_NAME, path.read_bytes())


def _publish(store: Store, plan: ShardPlan, done: list[PackedShard]) -> DatasetManifest:
    splits: dict[str, list[ShardInfo]] = {}
    for packed in done:
        if packed.samples:
            splits.setdefault(packed.split, []).append(packed.info())
    if not splits:
        raise UserError(f"not one image is good; see {join(store.place, QUARANTINE_NAME)}")
    source = {
        "kind": plan.corpus.kind,
        "samples": plan.corpus.samples,
        "bytes": plan.corpus.bytes,
        "quarantined": sum(len(p.bad) for p in done),
        "duplicates": left_out_of(plan),
        "ignored": plan.corpus.ignored,
        "digest": plan.corpus.digest,
        "plan": plan.digest,
        "options": asdict(plan.options),
    }
    return publish_manifest(store, splits, plan.classes, source)


def publish_manifest(
    store: Store, splits: dict[str, list[ShardInfo]], classes: list[str] | None, source: dict[str, object]
) -> DatasetManifest:
    """Counts, draws the contact sheet of the first split and writes `dataset.json`, last; returns what it says.

    Without times and places, so that the same corpus and options give the same manifest. One that says the same
    already is left alone.
    """
    if MANIFEST_NAME in (there := store.list()) and SHEET_NAME in there:
        earlier = _earlier(store)
        same = (splits, classes, source, tool_version())
        if earlier and (earlier.splits, earlier.classes, earlier.source, earlier.tool_version) == same:
            return earlier
    stats = {}
    for number, (split, shards) in enumerate(splits.items()):
        stats[split], chosen = split_stats(store, shards)
        if number == 0:
            store.write(SHEET_NAME, contact_sheet(store, chosen, classes))
    manifest = DatasetManifest(splits, classes, dict(source), stats, tool_version())
    store.write(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _earlier(store: Store) -> DatasetManifest | None:
    try:
        return load_manifest(store)
    except UserError:  # damaged, or of another version: written again
        return None


def tool_version() -> str:
    """The version of the installed package."""
    try:
        return version("mixer-pretraining")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
