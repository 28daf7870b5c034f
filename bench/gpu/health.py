"""Whether the GPU still answers: after a kernel that read past its memory, no later call of that process does."""

from __future__ import annotations

import torch


def device_answers() -> bool:
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
