"""`python -m tbrm_kernels`: which backends can run here, and what keeps the others."""

from __future__ import annotations

from . import backends

for name, status in backends().items():
    print(f"tbrm_kernels: {name:6} {'yes' if status.usable else f'no: {status.reason}'}")
