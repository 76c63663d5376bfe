"""What may import what: quick commands, layers, and strategies that need no DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import script

ROOT = Path(__file__).parents[2]


def output(code: str, *args: str) -> str:
    done = subprocess.run(script(code, *args), capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


HELP = """
sys.argv = ["mixer", *sys.argv[1:]]
from launch.cli import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
heavy = {"torch", "accelerate", "deepspeed", "tensorboard", "pyarrow", "PIL"} & sys.modules.keys()
print("heavy:", sorted(heavy))
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["train", "digits", "data.train=synthetic", "--print-config"]],
    ids=lambda a: " ".join(a[:2]),
)
def test_quick_commands_import_nothing_heavy(arguments):
    assert output(HELP, *arguments).endswith("heavy: []\n")


def test_data_tools_import_no_torch():
    code = """
import importlib, pkgutil
import data_tools
for module in pkgutil.walk_packages(data_tools.__path__, "data_tools."):
    importlib.import_module(module.name)
print(sorted({"torch", "pipeline", "launch"} & sys.modules.keys()))
"""
    assert output(code) == "[]\n"


def test_contracts_between_packages_hold():
    """Those of [tool.importlinter] in pyproject.toml."""
    tool = Path(sys.executable).with_name("lint-imports")
    command = [str(tool)] if tool.exists() else [sys.executable, "-m", "importlinter.cli"]
    done = subprocess.run([*command, "--no-cache"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


BLOCKED = """
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
class NoDeepSpeed(MetaPathFinder, Loader):  # found, and fails on import: as where it cannot build its operators
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] == "deepspeed" else None
    def exec_module(self, module):
        raise ImportError("deepspeed is blocked")
sys.meta_path.insert(0, NoDeepSpeed())
from pathlib import Path
from helpers import train
from data_tools.errors import UserError
for strategy in ("ddp", "fsdp"):
    assert train(Path(sys.argv[1]) / strategy, f"train.strategy={strategy}", "train.duration=2 steps") == 0
try:
    train(Path(sys.argv[1]) / "zero", "train.strategy=zero1")
except UserError as e:
    print("refused:", e)
assert "deepspeed" not in sys.modules
"""


def test_ddp_and_fsdp_run_where_deepspeed_cannot_be_imported(tmp_path):
    text = output(BLOCKED, str(tmp_path))
    assert "refused: train.strategy=zero1 cannot start here" in text
    assert "choose train.strategy=fsdp or ddp" in text
    assert (tmp_path / "ddp" / "FINISHED").exists() and (tmp_path / "fsdp" / "FINISHED").exists()
