"""The `mixer` command: thin subcommands over `data_tools`, `pipeline` and `launch`.

Nothing heavy is imported before a subcommand runs, so `mixer --help` answers at once. A `UserError` ends as one or
two lines; anything else does too, unless `--debug` asks for the traceback.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli import data_app, shard
from data_tools.errors import UserError
from launch.checkpoints import checkpoint_app
from launch.cli_cluster import launch_slurm, launch_torchrun
from launch.compare import compare_app
from launch.doctor import doctor
from launch.picture_cli import picture
from launch.plan_cli import plan
from launch.status_cli import status
from launch.watch_cli import logs, stop, why

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain MLP-Mixer and its relatives: shard a corpus, train on it, resume whatever happened.",
    epilog="`mixer COMMAND --help` shows examples. `--debug` anywhere shows tracebacks.",
)
launch_app = typer.Typer(no_args_is_help=True, help="Start trainings: on this machine, on SLURM, on hosts.")

# In the order in which people need them; `mixer --help` shows the panels as they first appear here
DATA, TRAINING, WATCHING, MODELS = "Data", "Training", "Watching", "Models"
app.command(rich_help_panel=DATA)(shard)
app.add_typer(data_app, name="data", rich_help_panel=DATA)
for command in (plan, doctor):
    app.command(rich_help_panel=TRAINING)(command)
app.add_typer(launch_app, name="launch", rich_help_panel=TRAINING)
for command in (status, logs, why, stop):
    app.command(rich_help_panel=WATCHING)(command)
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel=WATCHING)
launch_app.command("slurm")(launch_slurm)
launch_app.command("torchrun")(launch_torchrun)

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings: key=value ...", show_default=False)]
Allow = Annotated[str, typer.Option(help="Keys that a resumed run may change although they change its meaning.")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Processes on this machine. Default: one a GPU.")]


@app.command(rich_help_panel=TRAINING)
def train(
    config: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    overrides: Overrides = None,
    nproc: Nproc = None,
    allow: Allow = "",
    print_config: Annotated[bool, typer.Option("--print-config", help="Show values and their origin.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Try it: 3 steps, save, resume, evaluate.")] = False,
) -> None:
    """Train, or go on with, the run in run.dir.

    Examples:

      mixer train digits data.train=shards/

      mixer train mixer_b16_i1k data.train=/shards run.dir=runs/b16 --nproc 8

      mixer train digits data.train=synthetic --smoke

      mixer train runs/b16/config.yaml run.dir=runs/again

    Exit codes: 0 finished, 75 saved after a signal and to be continued
    (`mixer resume RUN`), others: an error.
    """
    from pipeline.config import format_config, load_config

    loaded = load_config(config, overrides or [])
    if print_config:
        typer.echo(format_config(loaded))
        return
    allowed = {key for key in allow.split(",") if key}
    processes = nproc or loaded.config.launch.nproc
    if "RANK" not in os.environ and (processes or _gpus()) > 1:
        from launch.local import LocalLauncher

        command = ["train", config, *(overrides or [])]
        command += ["--allow", allow] if allow else []
        command += ["--smoke"] if smoke else []
        launcher = LocalLauncher(
            command, loaded.config, processes or _gpus(), 0 if smoke else loaded.config.launch.max_restarts
        )
        raise typer.Exit(launcher.launch())
    from pipeline.cli import run_smoke, run_training

    if smoke:
        raise typer.Exit(run_smoke(loaded.config))
    from launch.output import appear

    here = appear(loaded.config.run.dir)
    raise typer.Exit(run_training(loaded.config, allowed, here.logs, here.pulse))


@app.command(rich_help_panel=TRAINING)
def resume(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes here. Default: as many as last time; of a submitted run: one a GPU."),
    ] = None,
    allow: Allow = "",
    nodes: Annotated[str | None, typer.Option(help="Of a submitted run: as in `mixer launch slurm`.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Of a submitted run: print the job script.")] = False,
    refresh_code: Annotated[
        bool, typer.Option("--refresh-code", help="Of a submitted run: take today's code.")
    ] = False,
) -> None:
    """Go on with a run from its last good checkpoint, on any number of processes and under any strategy.

    A run that was submitted to SLURM is submitted again, with the code that it was
    submitted with; --nproc goes on here instead.

    Examples:

      mixer resume runs/b16

      mixer resume runs/b16 --nproc 4 train.strategy=fsdp

      mixer resume runs/b16 train.duration="20 epochs"

      mixer resume /runs/b16 --nodes 4-6
    """
    from launch.cli_cluster import resubmit, was_submitted
    from pipeline.cli import existing_run
    from pipeline.run import read_lines

    folder = existing_run(run)
    if was_submitted(run) and nproc is None:
        resubmit(run, overrides or [], nodes, allow, dry_run, refresh_code)
        return
    if nodes or dry_run or refresh_code:
        raise UserError(f"{run} was not submitted from here, so --nodes, --dry-run and --refresh-code mean nothing")
    if not folder.locked():  # else it is meant for the training that is there
        folder.stop.unlink(missing_ok=True)
    starts = [e for e in read_lines(folder.events) if e["event"] in ("start", "resume")]
    # Of a run that was submitted, "last time" was on many nodes
    submitted = (folder.path / "launch" / "submission.json").exists()
    last = starts[-1]["world_size"] if starts and not submitted else None
    settings = [f"run.dir={folder.path}", *(overrides or [])]
    asked = any(s.startswith("launch.nproc=") for s in settings)
    train(str(folder.config), settings, nproc or (None if asked else last), allow, False, False)


@launch_app.command("local")
def launch_local(
    config: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    overrides: Overrides = None,
    nproc: Nproc = None,
    allow: Allow = "",
) -> None:
    """Train on this machine, in one process or several, restarting them when one dies.

    Example: mixer launch local digits data.train=shards/ --nproc 2
    """
    from launch.local import LocalLauncher
    from pipeline.config import load_config

    loaded = load_config(config, overrides or []).config
    command = ["train", config, *(overrides or []), *(["--allow", allow] if allow else [])]
    processes = nproc or loaded.launch.nproc or _gpus()
    raise typer.Exit(LocalLauncher(command, loaded, processes, loaded.launch.max_restarts).launch())


@app.command("eval", rich_help_panel=MODELS)
def evaluate(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or what `mixer import` made.")],
    overrides: Overrides = None,
    checkpoint: Annotated[str, typer.Option(help="last, best or step-N.")] = "last",
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights instead.")] = False,
    real: Annotated[Path | None, typer.Option(help="JSON of all labels that are right for each image (ReaL).")] = None,
    nproc: Nproc = None,
) -> None:
    """Top-1, top-5, a table by class, a confusion picture and img/s; each sample exactly once.

    Over the run's val split, or any set: shards or a folder of images.

    Examples:

      mixer eval runs/b16 --checkpoint best

      mixer eval runs/b16 data.val=/shards/imagenet_v2 --nproc 8

      mixer eval b16 data.val=imagenet/val --real real.json
    """
    from pipeline.cli_eval import run_eval

    options = ["--checkpoint", checkpoint, *(["--ema"] if ema else []), *(["--real", str(real)] if real else [])]
    _in_processes("eval", [run, *(overrides or []), *options], run, nproc)
    raise typer.Exit(run_eval(run, checkpoint, ema, overrides or [], real))


@app.command(rich_help_panel=MODELS)
def fewshot(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or what `mixer import` made.")],
    data: Annotated[str, typer.Argument(help="Shards or a folder of images: shots are chosen from its train split.")],
    overrides: Overrides = None,
    test: Annotated[str | None, typer.Option(help="Where to test. Default: the val or test split of DATA.")] = None,
    shots: Annotated[str, typer.Option(help="Images of each class.")] = "1,5,10,25",
    seeds: Annotated[int, typer.Option(min=1, help="Choices of images; accuracies are their mean.")] = 3,
    pool: Annotated[int | None, typer.Option(min=1, help="Choose from the first N images only.")] = None,
    l2: Annotated[float, typer.Option(help="Weight of the penalty.")] = 1024.0,
    checkpoint: Annotated[str, typer.Option(help="last, best or step-N.")] = "last",
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights instead.")] = False,
    nproc: Nproc = None,
) -> None:
    """Few-shot accuracy of frozen features: ridge regression in closed form, as in the paper.

    Examples:

      mixer fewshot runs/b16 /shards/imagenet --shots 5,10

      mixer fewshot runs/h14 pets/ --nproc 8 train.strategy=fsdp
    """
    from pipeline.cli_eval import run_fewshot

    try:
        numbers = [int(s) for s in shots.split(",")]
    except ValueError:
        raise UserError(f"--shots {shots}: give whole numbers, such as 1,5,10,25") from None
    options = ["--shots", shots, "--seeds", str(seeds), "--l2", str(l2), "--checkpoint", checkpoint]
    options += [*(["--ema"] if ema else []), *(["--test", test] if test else [])]
    options += ["--pool", str(pool)] if pool else []
    _in_processes("fewshot", [run, data, *(overrides or []), *options], run, nproc)
    raise typer.Exit(run_fewshot(run, data, test, checkpoint, ema, overrides or [], numbers, seeds, pool, l2))


@app.command(rich_help_panel=WATCHING)
def audit(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    overrides: Overrides = None,
) -> None:
    """Prove from the ledger that every sample of every epoch was consumed exactly once, across all restarts.

    Exit code 1, and what is wrong, if it was not.

    Examples:

      mixer audit runs/b16

      mixer audit runs/b16 data.train=/where/the/shards/are/now
    """
    from pipeline.cli import run_audit

    raise typer.Exit(run_audit(run, overrides or []))


@app.command(rich_help_panel=MODELS)
def export(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    out: Annotated[Path | None, typer.Argument(help="File (timm: folder). Default: in RUN/export.")] = None,
    form: Annotated[str, typer.Option("--format", help="safetensors, timm, npz or torch.")] = "safetensors",
    checkpoint: Annotated[str, typer.Option(help="last, best or step-N.")] = "last",
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights instead.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write a checkpoint's weights in another format, on one CPU, at any time.

    Examples:

      mixer export runs/b16 --format timm --checkpoint best

      mixer export runs/b16 b16.npz --format npz --ema
    """
    from pipeline.weights.commands import run_export

    raise typer.Exit(run_export(run, out, form, checkpoint, ema, dtype))


@app.command(rich_help_panel=TRAINING)
def finetune(
    source: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or what `mixer import` made.")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="finetune, or finetune_i1k, finetune_cifar, finetune_pets.")] = "finetune",
    checkpoint: Annotated[str, typer.Option(help="last, best or step-N.")] = "last",
    ema: Annotated[bool, typer.Option("--ema", help="Begin with the averaged weights.")] = False,
    nproc: Nproc = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show values and their origin.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Try it: 3 steps, save, resume, evaluate.")] = False,
) -> None:
    """Train a model further on another set, with a new head: shards or a folder of images.

    A higher resolution grows the token MLPs (paper, appendix C): a multiple of
    the one it was trained at.

    Examples:

      mixer finetune runs/b16 data.train=/shards/cifar10 --recipe finetune_cifar

      mixer finetune runs/l16 data.train=/shards/in1k --recipe finetune_i1k model.image_size=448

      mixer finetune b16 data.train=pets/ run.dir=runs/pets optimizer.lr=0.01
    """
    from pipeline.weights.finetune import finetune_settings

    recipe, settings = finetune_settings(source, recipe, overrides or [], checkpoint, ema)
    train(recipe, settings, nproc, "", print_config, smoke)


@app.command("import", rich_help_panel=MODELS)
def import_weights(
    source: Annotated[str, typer.Argument(help="An .npz or .safetensors file, a timm folder, a run, a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    model: Annotated[str | None, typer.Option(help="What it must be, such as mixer_b16. Default: as found.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels it must have been trained at.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes it must have; a missing head is made.")] = None,
) -> None:
    """Make weights from elsewhere a checkpoint to evaluate, fine-tune or begin with.

    Examples:

      mixer import Mixer-B_16.npz b16

      mixer import gs://mixer_models/imagenet21k/Mixer-L_16.npz l16-21k

      mixer import timm-folder/ b16 --model mixer_b16 --num-classes 1000
    """
    from pipeline.weights.commands import run_import

    raise typer.Exit(run_import(source, out, model, image_size, num_classes))


app.command(rich_help_panel=MODELS)(picture)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Made, or emptied where an earlier demo made it.")] = Path("demo"),
    report: Annotated[bool, typer.Option("--report", help="Only look again at what an earlier demo left.")] = False,
) -> None:
    """Shard real images, train, kill -9, resume elsewhere, evaluate, compare.

    A few minutes on two cores. Fails if the kill missed, if the samples differ
    from those of an undisturbed run, or below 95% accuracy.
    Needs the extra `demo`: pip install 'mixer-pretraining\\[demo]'
    """
    from launch.demo import report_demo, run_demo

    raise typer.Exit(report_demo(folder) if report else run_demo(folder))


app.add_typer(compare_app, name="compare", rich_help_panel=MODELS)


def _in_processes(command: str, arguments: list[str], run: str, nproc: int | None) -> None:
    """Where several processes are asked for: runs the command in them and exits; else returns."""
    processes = nproc or _gpus()
    if "RANK" in os.environ or processes == 1:
        return
    from launch.local import LocalLauncher
    from pipeline.weights.trained import run_config

    raise typer.Exit(LocalLauncher([command, *arguments], run_config(run), processes, 0).launch())


def _gpus() -> int:
    """GPUs here, without importing torch where there can be none: `mixer train --help` and typos stay quick."""
    if not Path("/dev/nvidiactl").exists():
        return 1
    from launch.local import default_nproc

    return default_nproc()


def main() -> None:
    """Runs the command line and turns exceptions into messages."""
    debug = "--debug" in sys.argv or os.environ.get("MIXER_DEBUG") == "1"
    sys.argv = [a for a in sys.argv if a != "--debug"]
    if debug:
        os.environ["MIXER_DEBUG"] = "1"  # for the training processes
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if (
        sys.stderr and not faulthandler.is_enabled()
    ):  # a crash in a native library leaves its stack, also in a rank's log
        faulthandler.enable()
    if under_torchrun:
        from launch.processes import die_with_parent, show_presence

        die_with_parent()
        show_presence()
    code: object = 0
    error: Exception | None = None
    try:
        app()
    except SystemExit as e:
        code = e.code
    except UserError as e:
        code, error = e.exit_code, e
        _last_words(e, code)
        if debug:
            raise
        _complain(str(e), under_torchrun)
    except Exception as e:
        code, error = 70, e  # EX_SOFTWARE
        told = _last_words(e, code)
        if debug:
            raise
        where = f"the traceback is in {told}" if told else "--debug shows the traceback"
        _complain(f"{_describe(e)} (unexpected; {where})", False)
    finally:
        if error is None:
            _last_words(None, 0)
        if under_torchrun and isinstance(code, int):
            from launch.processes import ELASTIC, report_outcome

            report_outcome(code)
            if code == 75 and ELASTIC in os.environ:
                code = 0  # else torchrun would start it again
            # After an error nothing is left to tidy up, and cleaning up after peers can hang
            if (error or code not in (0, 75)) and not debug:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    sys.exit(code)  # type: ignore[arg-type]


def _describe(error: Exception) -> str:
    from pipeline.logs import says_another_left

    said = f"{type(error).__name__}: {error}"
    return f"another training process went away: {said[:160]}" if says_another_left(said) else said


def _last_words(error: Exception | None, code: int) -> str | None:
    """Of a training process, into its run folder. Returns the file where the error is told."""
    if "launch.output" not in sys.modules:  # not a training process
        return None
    from launch.output import say_last_words

    return say_last_words(error, code)


FIRST_WORD_SECONDS = 2.0  # for rank 0 to say what all would say


def _complain(message: str, collective: bool) -> None:
    """Prints an error; one that several ranks of a machine meet, once: for all of them rank 0 speaks, if it does."""
    rank = int(os.environ.get("RANK", 0))
    if collective:
        from launch.processes import speaks_first

        if not speaks_first(message, FIRST_WORD_SECONDS if rank else 0.0):
            return
    prefix = f"error (rank {rank}): " if rank else "error: "
    print(prefix + message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
