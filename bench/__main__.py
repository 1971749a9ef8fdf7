"""All benchmarks, one after the other; each is also a command of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ALL = ("engine", "syscalls", "containers", "processes", "latency", "idle", "files", "client_decode")

if __name__ == "__main__":
    worst = 0
    for name in sys.argv[1:] or ALL:
        print(f"\n== {name}: python bench/{name}.py", flush=True)
        worst = max(worst, subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=False).returncode)
    sys.exit(worst)
