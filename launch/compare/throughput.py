"""`mixer compare throughput`: images a second of the Mixer and of what it is compared with, on this device."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_tools.errors import UserError


class Precision(StrEnum):
    """Of the computation; weights are fp32."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Compile(StrEnum):
    """As train.compile."""

    none = "none"
    block = "block"
    model = "model"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


def throughput(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="NAME, NAME@PIXELS or NAME@PIXELS:hidden_dim=64,num_blocks=2; names as model.name takes them. "
            "Default: Mixer-B and -L/16, ViT-B and -L/16, BiT-R50x1, HaloNet-H1, NFNet-F0.",
            show_default=False,
        ),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Small models of the same families, for a CPU.")] = False,
    image_size: Annotated[int, typer.Option(min=1, help="Pixels, where a MODEL says none.")] = 224,
    batch_size: Annotated[
        str | None, typer.Option(help="One or several: each model gets the fastest. Default: 64,128,256; CPU: 8.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="auto: bf16 on a GPU, fp32 on a CPU.")] = Precision.auto,
    compiled: Annotated[Compile, typer.Option("--compile", help="As train.compile.")] = Compile.none,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Convolutional networks in NHWC, which GPUs like in bf16.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each model, interleaved.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each measurement.")] = 1.0,
    device: Annotated[Device, typer.Option()] = Device.auto,
    out: Annotated[Path, typer.Option(help="Folder for throughput.md, .png and .json.")] = Path("compare"),
) -> None:
    """Images a second of Mixer, ViT, BiT, HaloNet and NFNet, side by side: the forward pass, and training.

    Beside the paper's img/s/core; the Mixer's ratio to the ViT of its size is
    the figure. Random pixels that lie on the device already, one device.

    Examples:

      mixer compare throughput --compile block

      mixer compare throughput mixer_b16 timm/vit_base_patch16_224 --batch-size 32,128,512

      mixer compare throughput mixer_h14 timm/vit_huge_patch14_224 timm/resnetv2_152x4_bit@480

      mixer compare throughput --small --device cpu
    """
    import os

    from pipeline.compare.chart import require_matplotlib

    require_matplotlib()
    if models and small:
        raise UserError("--small names the models itself: leave it or the names out")
    if device == Device.cpu:
        os.environ["MIXER_DEVICE"] = "cpu"
    from pipeline.cli import quiet_libraries
    from pipeline.compare.throughput import MODELS, SMALL, Candidate, Options, measure
    from pipeline.compare.throughput_report import report
    from pipeline.parallel.world import World

    candidates = [Candidate.parse(text, image_size) for text in models or (SMALL if small else MODELS)]
    labels = [(c.label, c.size) for c in candidates]
    if twice := next((c for c in labels if labels.count(c) > 1), None):
        raise UserError(f"{twice[0]} is there twice")
    quiet_libraries()
    world = World.join()
    try:
        on_gpu = world.device.type == "cuda"
        if device == Device.cuda and not on_gpu:
            raise UserError("--device cuda, but torch sees no GPU here: `mixer doctor` says more")
        options = Options(
            _sizes(batch_size or ("64,128,256" if on_gpu else "8")),
            ("bf16" if on_gpu else "fp32") if precision == Precision.auto else precision.value,
            compiled.value,
            rounds,
            seconds,
            channels_last=channels_last,
        )
        timings = measure(candidates, options, world, lambda text: typer.echo(text, err=True))
        typer.echo(report(timings, options, world.device, out))
    finally:
        world.leave()
    typer.echo(f"\nwritten: {out / 'throughput.md'}, {out / 'throughput.png'}, {out / 'throughput.json'}")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UserError(f"--batch-size {text}: give whole numbers, such as 64 or 64,128,256")
    return sizes
