"""What a committed figure must name."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def processor() -> str:
    path = Path("/proc/cpuinfo")  # Linux alone has it
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Of the code that runs; with a + where files that git knows are not as they were committed."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
