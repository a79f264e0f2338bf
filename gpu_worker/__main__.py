"""`python -m gpu_worker [--engine torch|relay|echo] [--node-id NAME]`: one worker under its restarting parent."""

import argparse
import os
import sys

from bus.process.parent import Role, run_role
from bus.settings import Settings
from gpu_worker.names import node_names

# torch's CPU threads wait for the next step asleep: spinning takes the cores from everything else here. Prompts are
# tokenised one at a time, so threads of the tokenizers would only lie about.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def configure(settings: Settings, arguments: list[str]) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m gpu_worker", description="One engine, one node of the fleet")
    parser.add_argument("--engine", choices=("torch", "relay", "echo"), default=settings.engine)
    parser.add_argument("--node-id", default=settings.node_id, help="default: <host>-<engine>-<first free number>")
    chosen = parser.parse_args(arguments)
    return settings.changed(engine=chosen.engine, node_id=chosen.node_id)


if __name__ == "__main__":
    role = Role("gpu_worker", child="gpu_worker.worker:run", configure=configure, names=node_names)
    sys.exit(run_role(role, sys.argv[1:], {**THREADS, **os.environ}))
