"""`mixer compare ...`: the systems of the paper side by side. One module a command, named as the command is.

A command here is a thin function over `pipeline.compare.NAME`, which it imports when it runs; it takes `--out`, the
folder for NAME.md, NAME.png and NAME.json (`pipeline.compare.report`), and prints the table.
"""

from __future__ import annotations

import typer

from launch.compare.runs import runs
from launch.compare.studies import permutation, scaling
from launch.compare.throughput import throughput

compare_app = typer.Typer(no_args_is_help=True, help="Systems side by side, each as table and picture.")
for command in (throughput, scaling, permutation, runs):
    compare_app.command()(command)
