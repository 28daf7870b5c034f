import os

import torch

# Before anything imports triton: without a GPU its kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
