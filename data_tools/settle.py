"""Which plan a run works on: the one that lies in the output, a new one, or none because they differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.draft import Draft
from data_tools.errors import Unfinished, UserError
from data_tools.finalize import QUARANTINE_NAME, SHEET_NAME
from data_tools.hashing import Spread, hash_block, on_processes
from data_tools.manifest import MANIFEST_NAME, index_name
from data_tools.output import Output
from data_tools.pack import marker_path
from data_tools.plan import ShardPlan
from data_tools.plan_store import DUPLICATES_NAME, PLAN_FOLDER, decode_plan, load_plan, remove_plan
from data_tools.planner import Report as PlanReport
from data_tools.storage import is_url
from data_tools.stores import LocalStore, Store

if TYPE_CHECKING:
    from data_tools.engines import ShardOptions


def settle_plan(options: ShardOptions, output: Output, report: PlanReport | None = None) -> ShardPlan:
    """The plan to work on: the one in the output folder where it is the same, else a new one."""
    _refuse_itself(options)
    folder = output.plan_folder
    earlier = load_plan(folder)
    if earlier is None and output.url is None:
        _refuse_foreign(output)
    draft = Draft(options.request(), options.plan_options(), folder, report, _spread(options, output))
    try:
        plan = _settled(draft, earlier, options, output)
        if output.url is not None:
            known = earlier is not None and earlier.digest == plan.digest
            _settle_remote(output, plan, options.overwrite, known)
    except Unfinished:
        raise
    except UserError:
        draft.clear()
        if earlier is None and output.url is not None:
            remove_plan(folder)
        raise
    draft.clear()
    return _store_plan(plan, output)


def _spread(options: ShardOptions, output: Output) -> Spread:
    """How the engine of this run hashes contents."""
    if options.engine == "ray":
        from data_tools.ray_pool import on_ray

        return on_ray(hash_block, options.workers)
    if options.engine == "slurm":
        from data_tools.slurm_array import on_array

        return on_array(output, options.num_tasks, options.workers, options.sbatch)
    return on_processes(options.workers)


def _settled(draft: Draft, earlier: ShardPlan | None, options: ShardOptions, output: Output) -> ShardPlan:
    change = None if earlier is None else draft.change_from(earlier)
    if earlier is not None and change is None:
        return earlier
    if earlier is not None and change is not None:
        if not options.overwrite and output.url is None:  # a URL's local folder holds nothing worth keeping
            raise _other_plan(output, change)
        _discard(LocalStore(output.folder), earlier)
        remove_plan(output.plan_folder)
    return draft.build()


def _refuse_itself(options: ShardOptions) -> None:
    for source in options.sources:
        if not is_url(source) and not is_url(options.out) and Path(options.out).resolve() == Path(source).resolve():
            raise UserError(f"{options.out}: the output folder is the corpus itself; give another one")


def _other_plan(output: Output, change: str) -> UserError:
    return UserError(
        f"{output.place} was begun with another plan: {change}.\n"
        "Undo that to go on, give another output folder, or discard its shards with --overwrite"
    )


_REMOTE_PLAN = f"{PLAN_FOLDER}/plan.json"


def _settle_remote(output: Output, plan: ShardPlan, overwrite: bool, known: bool) -> None:
    """Refuses, or with `overwrite` discards, what another plan left in the object store.

    `known`: this plan was begun from here before; its header missing there means that the store lost it.
    """
    store = output.store()
    try:
        header = store.read(_REMOTE_PLAN)
    except FileNotFoundError:
        if not known:
            _refuse_foreign(output)
        return
    earlier = decode_plan(header, output.place)
    if earlier.digest == plan.digest:
        return
    if not overwrite:
        raise _other_plan(output, _difference(earlier, plan))
    _discard(store, earlier)


def _difference(old: ShardPlan, new: ShardPlan) -> str:
    before, now = vars(old.options), vars(new.options)
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if old.corpus.digest != new.corpus.digest:
        changed.append(f"the corpus changed ({old.corpus.samples:,} images then, {new.corpus.samples:,} now)")
    return "; ".join(changed) or "the order, splits or classes of the corpus"


def _store_plan(plan: ShardPlan, output: Output) -> ShardPlan:
    if output.url is not None:
        output.store().write(_REMOTE_PLAN, (output.plan_folder / "plan.json").read_bytes())
    return plan


def _refuse_foreign(output: Output) -> None:
    found = sorted(name for name in output.store().list() if name.endswith(".tar") or name == MANIFEST_NAME)
    if found:
        raise UserError(
            f"{output.place} already holds {found[0]}, which this command did not make; give another folder"
        )


def _discard(store: Store, plan: ShardPlan) -> None:
    """Deletes what `plan` made and nothing else; the plan last, so that a kill in between is safe."""
    names = [s.name for s in plan.shards]
    store.delete([f"{PLAN_FOLDER}/{marker_path(Path(), name).name}" for name in names])
    store.delete([*names, *map(index_name, names), MANIFEST_NAME, QUARANTINE_NAME, SHEET_NAME, DUPLICATES_NAME])
    store.delete([_REMOTE_PLAN])
