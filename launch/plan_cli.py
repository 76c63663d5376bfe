"""`mixer plan`: what a recipe needs on a cluster that nobody holds yet. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Annotated, Any

import typer

from data_tools.errors import UserError
from pipeline.duration import Duration
from pipeline.plan import DEVICES, GIB, STRATEGIES, Assumptions, Outlook, Setting, Speed


def plan(
    config: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings: key=value ...", show_default=False)] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: 8.")] = None,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "h100",
    samples: Annotated[int | None, typer.Option(min=1, help="Training images, where data.train is not here.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Where neither recipe nor data say it.")] = None,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1, help="Measured on your GPU; else assumed.")] = None,
    network: Annotated[float | None, typer.Option(help="GB/s of one node. Default: as the vendor builds it.")] = None,
    failures: Annotated[
        float | None, typer.Option(help="GPU hours between two failures. Default: those of Llama 3's training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Memory a device, images a second, days and goodput of a recipe, for hardware you need not hold.

    What is assumed is printed; `--mfu` and `--failures` replace the weightiest guesses.

    Examples:

      mixer plan mixer_b16_i1k --samples 1281167 --gpus-per-node 8 --gpu h100

      mixer plan mixer_b16_i1k train.strategy=fsdp --samples 1281167 --nodes 16 --gpu a100 --mfu 0.4 --json
    """
    from pipeline.plan import outlook, speed

    if gpu not in DEVICES:
        raise UserError(f"there is no --gpu {gpu}; one of {', '.join(DEVICES)}")
    device = DEVICES[gpu]
    device = replace(device, network=network * 1e9) if network else device
    assumed = Assumptions()
    if mfu:
        assumed = replace(assumed, mfu_eager=mfu, mfu_compiled=mfu)
    if failures:
        assumed = replace(assumed, gpu_hours_a_failure=failures)
    c, epoch = _read(config, overrides or [], samples)
    s = _setting(c, nodes, gpus_per_node or device.a_node, classes)
    free = device.memory * assumed.usable - assumed.context
    rows = [_row(s, name, device, free, assumed) for name in STRATEGIES]
    asked = c.train.strategy
    chosen = next((r for r in rows if r["strategy"] == asked), None) if asked != "auto" else _auto(rows, s, device)
    if chosen is None or not chosen["micro_batch"]:
        _show(s, rows, None, None, None, device, assumed, c, epoch, as_json)
        raise UserError(
            f"{asked} does not fit {device.name}: take more GPUs, train.strategy=fsdp, or "
            "train.activation_checkpointing=block"
        )
    s = replace(s, strategy=chosen["strategy"], micro_batch_size=chosen["micro_batch"])
    steps = Duration.parse(c.train.duration).to_steps(c.train.global_batch_size, epoch or 0)
    pace = speed(s, device, assumed)
    every = Duration.parse(c.checkpoint.every)
    save_s = every.seconds() if every.is_time else every.to_steps(s.global_batch_size, epoch or 0) * pace.step_s
    _show(s, rows, pace, outlook(s, pace, steps, save_s, assumed), save_s, device, assumed, c, epoch, as_json)


def _read(config: str, overrides: list[str], samples: int | None) -> tuple[Any, int | None]:
    """The recipe, and the images of an epoch where they are known or needed."""
    from pipeline.config import load_config

    try:
        c = load_config(config, overrides).config
    except UserError as e:
        if "data.train has no value" not in str(e):
            raise
        c = load_config(config, [*overrides, "data.train=synthetic"]).config  # its size is given, or does not matter
    epoch = samples or _known_samples(c.data.train)
    texts = (c.train.duration, c.checkpoint.every)
    if epoch is None and any(Duration.parse(t).unit == "epochs" for t in texts):
        raise UserError(
            f"{config} counts in epochs: say how many images one has, with --samples N or data.train=FOLDER"
        )
    return c, epoch


def _known_samples(train: Any) -> int | None:
    from data_tools.manifest import DatasetManifest

    if not isinstance(train, str) or train == "synthetic":
        return None
    return sum(shard.samples for shard in DatasetManifest.load(train).splits["train"])


def _setting(c: Any, nodes: int, gpus: int, classes: int | None) -> Setting:
    from data_tools.manifest import DatasetManifest
    from pipeline.model import model_cost
    from pipeline.model.variants import check_image_size, names, resolve

    if c.model.name not in names():
        raise UserError(f"the plan knows the Mixers ({', '.join(names())}), not {c.model.name}")
    k = classes or c.model.num_classes
    if k is None and isinstance(c.data.train, str) and c.data.train != "synthetic":
        k = len(DatasetManifest.load(c.data.train).classes or []) or None
    if k is None:
        raise UserError("say how many classes the head has: --classes N, or model.num_classes=N")
    spec = resolve(c.model.name, **c.model.overrides())
    cost = model_cost(c.model.name, k, c.model.image_size, **c.model.overrides())
    if nodes * gpus > c.train.global_batch_size:
        raise UserError(f"{nodes * gpus} GPUs, but train.global_batch_size={c.train.global_batch_size}: fewer GPUs")
    return Setting(
        spec,
        check_image_size(c.model.image_size, spec.patch_size),
        k,
        cost,
        "ddp",
        c.train.global_batch_size,
        1,
        nodes,
        gpus,
        c.train.precision,
        c.train.compile,
        c.train.activation_checkpointing,
        c.train.reshard_after_forward,
        c.train.shard_size,
        c.train.ema_decay is not None,
        2 if c.optimizer.name == "adamw" else 1,
    )


def _row(s: Setting, strategy: str, device: Any, free: float, assumed: Assumptions) -> dict[str, Any]:
    from pipeline.plan import largest_micro_batch, memory, speed

    s = replace(s, strategy=strategy)
    micro = largest_micro_batch(s, device, assumed)
    s = replace(s, micro_batch_size=max(1, micro))
    m = memory(s)
    return {
        "strategy": strategy,
        "micro_batch": micro,
        "accumulated": s.micro_steps if micro else None,
        "bytes": m.total,
        "share": (m.total + assumed.context) / device.memory,
        "parts": asdict(m),
        "img_per_s": speed(s, device, assumed).img_per_s if micro else None,
    }


def _auto(rows: list[dict[str, Any]], s: Setting, device: Any) -> dict[str, Any] | None:
    """What train.strategy=auto takes: ddp while 16 bytes a parameter fit half of the device, else fsdp."""
    name = "ddp" if 16 * s.cost.parameters <= device.memory / 2 else "fsdp"
    return next(r for r in rows if r["strategy"] == name)


def _show(
    s: Setting,
    rows: list[dict[str, Any]],
    pace: Speed | None,
    run: Outlook | None,
    save_s: float | None,
    device: Any,
    assumed: Assumptions,
    c: Any,
    epoch: int | None,
    as_json: bool,
) -> None:
    from pipeline.plan import best_save_interval

    if as_json:
        facts = {
            "model": {"parameters": s.cost.parameters, "forward_macs": s.cost.forward_macs},
            "gpus": s.ranks,
            "device": asdict(device),
            "strategies": rows,
            "chosen": s.strategy if pace else None,
            "speed": asdict(pace) if pace else None,
            "run": asdict(run) if run else None,
            "assumed": asdict(assumed),
        }
        typer.echo(json.dumps(facts, indent=1))
        return
    cost = s.cost
    typer.echo(
        f"{c.model.name} at {s.image_size[0]} px, {s.num_classes} classes: {cost.parameters / 1e6:.2f}M parameters, "
        f"{cost.training_flops / 1e9:,.1f} GFLOP to train on one image"
    )
    typer.echo(
        f"{s.nodes} x {s.gpus_per_node} {device.name}, {device.memory / GIB:.0f} GiB; batch {s.global_batch_size}, "
        f"{s.precision}, compile={s.compile}, activation_checkpointing={s.activation_checkpointing}\n"
    )
    typer.echo("strategy  micro-batch      GiB   used    state  activations  buffers      img/s")
    for r in rows:
        p = r["parts"]
        state = p["weights"] + p["gradients"] + p["moments"] + p["ema"]
        fits = f"{r['micro_batch']:>5} x {r['accumulated']:<3}" if r["micro_batch"] else " not even 1"
        rate = f"{r['img_per_s']:>11,.0f}" if r["img_per_s"] else ""
        typer.echo(
            f"{r['strategy']:<8} {fits:>12} {r['bytes'] / GIB:>8.1f} {r['share']:>6.0%} {state / GIB:>8.1f} "
            f"{(p['activations'] + p['work']) / GIB:>12.1f} {p['buffers'] / GIB:>8.1f}{rate}"
        )
    if pace and run and save_s:
        loader = pace.img_per_s / s.nodes
        typer.echo(
            f"\n{s.strategy}: {pace.img_per_s:,.0f} img/s ({pace.img_per_s / s.ranks:,.0f} a GPU, MFU {pace.mfu:.0%}), "
            f"{pace.step_s:.3f} s a step, of which {pace.communication_s:.3f} s communication before overlap"
        )
        typer.echo(
            f"run: {run.steps:,} steps{f' over {epoch:,} images an epoch' if epoch else ''}, {run.exaflop:,.1f} EFLOP; "
            f"{_hours(run.compute_h)} of steps, {_hours(run.wall_h)} with {run.failures:.1f} failures "
            f"(goodput {run.goodput:.1%}), {run.gpu_hours:,.0f} GPU hours"
        )
        typer.echo(
            f"saving every {_hours(save_s / 3600)}; least is lost at {_hours(best_save_interval(s, assumed) / 3600)}. "
            f"Each node must read and decode {loader:,.0f} img/s: "
            f"{loader / (s.gpus_per_node * max(1, c.data.num_workers)):,.0f} a worker"
        )
    given = "; ".join(f"{f.name}={getattr(assumed, f.name):.6g}" for f in fields(assumed))
    typer.echo(
        f"\nassumed: {given}; links {device.links / 1e9:.0f} GB/s a GPU, network {device.network / 1e9:.0f} GB/s a node"
    )


def _hours(hours: float) -> str:
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
