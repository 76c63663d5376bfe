"""Training from Google Cloud Storage: gcsfs against a server on loopback, the same run as from local files.

Skips where they are not installed: the extras `gs` and `dev`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from gs_server import GSServer
from helpers import members, shards_of, train, write_dataset
from mixer_process import assert_same_run

from data_tools.errors import UserError
from pipeline.cli import run_audit

# Not imported here: how gcsfs behaves is settled before its first import, by pipeline.data.store
MISSING = [name for name in ("gcsfs", "gcp_storage_emulator") if find_spec(name) is None]
pytestmark = [pytest.mark.gs, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

STEPS = 12


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("set"), {"train": shards_of(members(90), [50, 40])})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, local: Path) -> Iterator[GSServer]:
    server = GSServer(tmp_path_factory.mktemp("server"))
    server.start()
    server.make_bucket("sets")
    for path in local.iterdir():
        server.put("sets", f"a/{path.name}", path.read_bytes())
    yield server
    server.kill()


@pytest.mark.parametrize("size", ["0", "4MiB"])
def test_from_a_bucket_as_from_local_files(local, server, tmp_path, size):
    common = ["model.num_classes=3", "data.chunk=4", "data.window=4", "data.num_workers=2", "data.read_timeout=30 s"]
    common += [f"train.duration={STEPS} steps"]
    store = [f"data.storage_options={json.dumps(server.options)}", f"data.cache_dir={tmp_path / 'cache'}"]
    here, there = tmp_path / "local" / "run", tmp_path / "store" / "run"
    assert train(here, f"data.train={local}", *common) == 0
    assert train(there, "data.train=gs://sets/a", *common, *store, f"data.cache_size={size}") == 0
    assert_same_run(there, here, STEPS)
    assert run_audit(str(there), []) == 0
    with pytest.raises(UserError, match=r"no dataset\.json in gs://sets/b"):
        train(tmp_path / "none", "data.train=gs://sets/b", *common, *store)
