"""Taking over a run folder at a start: lock it, compare with what it was started with, write down what runs now."""

from __future__ import annotations

import os
from dataclasses import replace

from data_tools.errors import UserError
from pipeline.checkpoint.place import checkpoint_places, checkpoint_root, committed_steps
from pipeline.config import Change, Config, diff_configs, load_config, to_yaml
from pipeline.run import RunFolder, read_lines, replace_file


def take_over_run(config: Config, allow: set[str], logs: str = "") -> RunFolder:
    """Locks the run folder, compares with what it was started with, writes down what runs now.

    Raises:
        UserError: another training holds the folder; or a key changed that a resume may not change.
    """
    run = RunFolder(config.run.dir, checkpoint_root(config))
    run.lock(logs)
    run.identity(make=True)
    refuse_endless_restarts(run)
    changes = permitted_changes(run, config, allow)
    if changes:
        print("changed since the last start: " + "; ".join(map(str, changes)), flush=True)
        run.record("config", changes=[{"key": c.key, "old": c.old, "new": c.new} for c in changes])
    run.finished.unlink(missing_ok=True)  # written again at the end; a longer duration goes on from here
    before = next((c.old for c in changes if c.key == "data.train"), config.data.train)
    subset = next((c.old for c in changes if c.key == "data.subset"), config.data.subset)
    # Whether other data is taken turns out when it is opened: see `accept_data`
    run.describe(to_yaml(replace(config, data=replace(config.data, train=before, subset=subset))))
    return run


def accept_data(run: RunFolder, config: Config) -> None:
    """The start has taken its data: from now on the run's own configuration names it."""
    if not run.config.exists():
        return
    stored = load_config(str(run.config)).config
    accepted = replace(stored, data=replace(stored.data, train=config.data.train, subset=config.data.subset))
    if accepted != stored:
        replace_file(run.config, to_yaml(accepted))


def refuse_endless_restarts(run: RunFolder) -> None:
    """Where only torchrun restarts (MIXER_MAX_FRUITLESS is set), starts without a new checkpoint are counted here."""
    limit = os.environ.get("MIXER_MAX_FRUITLESS")
    if limit is None or "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return
    fruitless = 0
    for event in read_lines(run.events):
        if event["event"] in ("start", "resume"):
            fruitless += 1
        elif event["event"] == "save":
            fruitless = 0
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and fruitless > int(limit):
        raise UserError(
            f"{run.path}: started {fruitless} times without a new checkpoint in between (launch.max_restarts); "
            f"see {run.path / 'logs'}"
        )


def permitted_changes(run: RunFolder, config: Config, allow: set[str]) -> list[Change]:
    """What is other than at the last start of a run that has checkpoints; nothing for one that has none.

    Raises:
        UserError: a key changed that a resume may not change, or only after --allow.
    """
    old = load_config(str(run.config)).config if run.config.exists() else None
    places = [checkpoint_places(c) for c in (old, config)] if old else []
    # The mirrors last: one that is out of reach matters only where nothing is here
    roots = [*(p[0] for p in places), *(mirror for p in places for mirror in p[1:])]
    if old is None or not any(map(committed_steps, roots)):
        return []
    changes = [c for c in diff_configs(old, config) if c.key != "run.dir"]
    moved = [c for c in changes if c.key == "checkpoint.dir"]
    if moved and not committed_steps(run.checkpoints):
        raise UserError(
            f"{run.checkpoints} holds no checkpoint, {checkpoint_root(old)} does ({moved[0]}): "
            "copy them there first, or keep checkpoint.dir"
        )
    refused = [c for c in changes if c.kind == "refused"]
    if refused:
        raise UserError(
            f"{run.path} is a run with other settings: {'; '.join(map(str, refused))}. These cannot "
            "change within a run: set them back, or start a new run with another run.dir"
        )
    undeclared = [c for c in changes if c.kind == "declared" and c.key not in allow]
    if undeclared:
        keys = ",".join(c.key for c in undeclared)
        raise UserError(
            f"{run.path}: this changes what is optimised: {'; '.join(map(str, undeclared))}. "
            f"If you mean it, add --allow {keys}"
        )
    return changes
