"""torchrun's agent without its noise: what failed is said by the processes and by the launcher, not by a traceback.

Where MIXER_LOGS names a folder, it leaves there how its processes ended.

`python -m launch.agent ARGS` takes torchrun's arguments and ends with its exit code.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path


def main() -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # of this process only
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as e:
        report({rank: (f.local_rank, f.pid, f.exitcode, f.timestamp) for rank, f in e.failures.items()})
        return 1
    except SignalException:
        return 1
    return 0


def report(failures: dict[int, tuple[int, int, int, int]]) -> None:
    """Writes down which processes ended how: one that a signal killed leaves no last words of its own.

    failures: rank -> (local rank, pid, exit code or minus the signal, seconds since the epoch).
    """
    import json
    import os
    import socket

    from pipeline.logs import LOGS, StartLogs
    from pipeline.run import replace_file

    if LOGS not in os.environ:
        return
    rows = [
        {"rank": rank, "local_rank": local, "pid": pid, "exit_code": code, "time": at, "host": socket.gethostname()}
        for rank, (local, pid, code, at) in failures.items()
    ]
    with contextlib.suppress(OSError):
        replace_file(StartLogs(Path(os.environ[LOGS])).agent(), json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
