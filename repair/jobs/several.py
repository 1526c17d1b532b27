"""Runs one job as several processes of this machine: `python -m repair.jobs.several FOLDER N`.

The worker's program, started N times by `accelerate launch`: on GPUs one each, otherwise with a
share of the processors. Each dies with this process, and this one with whoever started it.
"""

import os
import sys
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser

from repair.machine import PARENT_VARIABLE, die_with_parent

# The same order of sets in all; nothing from the job's folder is imported; arrays stay on this
# machine (they find each other by a port that is open to others as well: see the README).
TOGETHER = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "GLOO_SOCKET_IFNAME": "lo"}


def main(folder: Path, num_processes: int) -> None:
    """Run the job in `folder`; how it ended is in its status."""
    die_with_parent()
    os.environ |= {**TOGETHER, PARENT_VARIABLE: str(os.getpid())}
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    options = {
        "--num_processes": num_processes, "--num_machines": 1, "--mixed_precision": "no",
        "--dynamo_backend": "no", "--main_process_port": 0, "--rdzv_backend": "static",
        "--num_cpu_threads_per_process": num_threads,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    # Of several processors too this is what starts several processes.
    words += ["--multi_gpu", "-m", "repair.jobs.worker", str(folder)]
    launch_command(launch_command_parser().parse_args(words))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
