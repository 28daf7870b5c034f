"""What a committed figure must name."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    path = Path("/proc/cpuinfo")  # Linux alone has it
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
