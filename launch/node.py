"""What srun starts once on every node of a job: torchrun with this node's training processes.

`python -m launch.node OUTCOME_FOLDER MAIN_HOST PORT ID NPROC COMMAND...`: COMMAND are arguments of `mixer`. How it went
is written to OUTCOME_FOLDER/<node>.json; the exit code is 0 also where the run was saved, so that srun ends the other
nodes (--kill-on-bad-exit) after real trouble only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from launch.processes import Agent, torchrun_arguments
from pipeline.run import replace_file

EXIT_SAVED = 75
_FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def main(arguments: list[str]) -> int:
    folder, host, port, identity, nproc = Path(arguments[0]), *arguments[1:5]
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    nodes, index = os.environ["SLURM_STEP_NUM_NODES"], os.environ["SLURM_NODEID"]
    seen: list[str] = []
    agent: Agent | None = None

    def forward(number: int, frame: object) -> None:
        seen.append(signal.Signals(number).name)
        if agent and seen.count(seen[-1]) == 1:
            agent.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    torchrun = torchrun_arguments(
        int(nproc),
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={identity}",
        f"--rdzv-conf=is_host={int(index == '0')},join_timeout=900,read_timeout=300",
        f"--local-addr={node}",
        "--max-restarts=0",  # launch.slurm_job restarts
    )
    environment = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "WANDB_MODE": "offline", **os.environ}
    agent = Agent(torchrun, arguments[5:], int(nproc), environment)
    for name in dict.fromkeys(seen):  # arrived while it was started
        agent.send_signal(signal.Signals[name])
    outcome = agent.wait()
    report = {"codes": outcome.codes, "agent": outcome.agent, "signals": seen}
    replace_file(folder / f"{node}.json", json.dumps(report) + "\n")
    if outcome.agent == 0 or EXIT_SAVED in outcome.codes:
        return 0
    return next((code for code in outcome.codes if 0 < code < 256), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
