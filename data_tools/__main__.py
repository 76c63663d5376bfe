"""`python -m data_tools`: the sharding commands without the rest of `mixer`; what array tasks run."""

from __future__ import annotations

import sys

import typer

from data_tools.cli import data_app, shard
from data_tools.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(shard)
app.add_typer(data_app, name="data")


def main() -> None:
    try:
        app()
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
