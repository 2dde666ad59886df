"""Prints what a result on this machine depends on: ``python -m bench.facts``.

GPUs, driver, versions and commit. No environment variables are printed, since they may hold passwords, and of the
packages names and versions alone, since their addresses may.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

GPU = "index,name,compute_cap,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current"
COMMANDS = (
    ("nvidia-smi", f"--query-gpu={GPU}", "--format=csv"),
    ("nvidia-smi", "topo", "-m"),
    ("git", "log", "-1", "--format=%H %cI"),
    ("git", "status", "--short"),
    (sys.executable, "-m", "torch.utils.collect_env"),
)


def main() -> None:
    for words in COMMANDS:
        print("$", *words, flush=True)
        try:
            subprocess.run(words, check=False)
        except FileNotFoundError:
            print("not installed")
    print("$ installed packages")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    for name in sorted(found, key=str.lower):
        print(f"{name}=={found[name]}")


if __name__ == "__main__":
    main()
