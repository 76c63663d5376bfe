"""torchrun's agent without its noise: what failed is said by the processes and by the launcher, not by a traceback.

`python -m launch.agent ARGS` takes torchrun's arguments and ends with its exit code.
"""

from __future__ import annotations

import logging
import sys


def main() -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # of this process only
    try:
        torchrun(sys.argv[1:])
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
