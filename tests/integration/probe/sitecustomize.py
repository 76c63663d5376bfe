"""Test-only: lets a test know where a training process was when it was killed, without a hook in the product.

Python imports this module at its start when its folder is on PYTHONPATH. Where MIXER_TEST_PROBE names a file, rank r
keeps two bytes of it, from offset 2r on: B inside a backward pass or '.', C inside a checkpoint's write or '.' (two,
for a write may go on beside training). A killed process cannot write that it left, so the bytes say where it died.
MIXER_TEST_STRETCH makes both places longer, by so many seconds, so that a wall clock hits them. MIXER_TEST_RAISE
"R:N" raises an error in the N-th backward pass of rank R.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

PROBE = os.environ.get("MIXER_TEST_PROBE")
STRETCH = float(os.environ.get("MIXER_TEST_STRETCH", "0"))


def marked(function: Callable[..., Any], mark: bytes) -> Callable[..., Any]:
    descriptor = os.open(str(PROBE), os.O_RDWR | os.O_CREAT)
    at = 2 * int(os.environ.get("RANK", "0")) + b"BC".index(mark)

    def inside(*args: Any, **kwargs: Any) -> Any:
        os.pwrite(descriptor, mark, at)
        time.sleep(STRETCH / 2)
        result = function(*args, **kwargs)
        time.sleep(STRETCH / 2)
        os.pwrite(descriptor, b".", at)
        return result

    return inside


def raising(function: Callable[..., Any]) -> Callable[..., Any]:
    rank, _, number = os.environ.get("MIXER_TEST_RAISE", "").partition(":")
    if rank != os.environ.get("RANK"):
        return function
    count = itertools.count(1)

    def inside(*args: Any, **kwargs: Any) -> Any:
        if next(count) == int(number):
            raise ZeroDivisionError("a test asked for it")
        return function(*args, **kwargs)

    return inside


def patch_engine(module: Any) -> None:
    make = module.make_engine

    def make_engine(*args: Any, **kwargs: Any) -> Any:
        engine = make(*args, **kwargs)
        engine._backward = raising(marked(engine._backward, b"B"))
        return engine

    module.make_engine = make_engine


def patch_layout(module: Any) -> None:
    module.write_pieces = marked(module.write_pieces, b"C")


def patch_manager(module: Any) -> None:
    module.CheckpointManager._commit = marked(module.CheckpointManager._commit, b"C")


PATCHES = {
    "pipeline.parallel.engine": patch_engine,
    "pipeline.checkpoint.layout": patch_layout,
    "pipeline.checkpoint.manager": patch_manager,
}


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules above as ever, and patches each right after it was executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES or path is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


if PROBE:
    sys.meta_path.insert(0, PatchingFinder())
