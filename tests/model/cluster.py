"""What srun, pdsh and ssh do with a command, all nodes being this machine: run as a script, this file is one of them.

And a job that is run on it. The stand-ins know the options that are used, and refuse others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}  # what a login shell has


def install(folder: Path) -> str:
    """Programs of these names in a folder; a PATH that finds them first."""
    folder.mkdir()
    for name in ("srun", "pdsh", "ssh"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -P "{__file__}" {name} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def srun(given: list[str]) -> int:
    """Slurm's: so many tasks a node, each with the whole environment; one that fails ends the others where asked to."""
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ntasks-per-node", type=int, required=True)
    parser.add_argument("--kill-on-bad-exit", type=int, choices=[0, 1], default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(given)
    tasks = [
        subprocess.Popen(
            asked.command,
            env={**os.environ, "SLURM_PROCID": str(task), "SLURM_NODEID": str(task // asked.ntasks_per_node)},
        )
        for task in range(asked.nodes * asked.ntasks_per_node)
    ]
    return ended(tasks, together=asked.kill_on_bad_exit == 1)


def pdsh(given: list[str]) -> int:
    """The command's words in a shell on each host, which has nothing of the environment here; %n is its number.

    A command that is to end processes by their name ends none: others' have it too.
    """
    parser = argparse.ArgumentParser("pdsh", allow_abbrev=False)
    parser.add_argument("-S", action="store_true")  # the largest exit code is that of all
    parser.add_argument("-f", type=int)  # hosts at a time
    parser.add_argument("-w", required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(given)
    if asked.command[0].startswith("pkill"):
        return 0
    line = " ".join(asked.command)
    hosts = [
        subprocess.Popen(["sh", "-c", line.replace("%n", str(number))], env={**HOME, "PDSH_HOST": host})
        for number, host in enumerate(asked.w.split(","))
    ]
    return ended(hosts, together=False)


def ssh(given: list[str]) -> int:
    """`hostname` and `hostname -I`, by which DeepSpeed's launcher sees that a host is there and where."""
    asked = given[-1] if given[-1] == "hostname" else " ".join(given[-2:])
    print({"hostname": "localhost", "hostname -I": "127.0.0.1"}[asked])
    return 0


def ended(processes: list[subprocess.Popen[bytes]], *, together: bool) -> int:
    """The largest exit code of all."""
    while any(process.poll() is None for process in processes):
        if together and any(process.poll() for process in processes):
            for process in processes:
                process.terminate()
        time.sleep(0.05)
    return max(abs(process.returncode) for process in processes)


def summing(job: dict[str, Any], out: Path, device: Any, progress: Any) -> dict[str, Any]:
    """What the ranks add up to, and of the environment of each what `job["names"]` names: a job."""
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    added = torch.tensor(torch.distributed.get_rank() + 1)
    torch.distributed.all_reduce(added)
    environments: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        environments, {name: os.environ[name] for name in job["names"] if name in os.environ}
    )
    torch.distributed.destroy_process_group()
    return {"sum": int(added), "environments": environments}


if __name__ == "__main__":
    sys.exit({"srun": srun, "pdsh": pdsh, "ssh": ssh}[sys.argv[1]](sys.argv[2:]))
