"""Builds the CPU kernels of csrc/, one library per instruction set; tbrm_kernels loads the one for the processor it runs on.

They need torch's headers and libraries. pip builds in an isolated environment, which has no torch, so the torch that is
installed where this package is going is looked for too. Without torch or a compiler the package is installed without
them, and `tbrm_kernels.backends()` says so.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "csrc/head.cpp"
HEADERS = [
    f"csrc/{name}.h"
    for name in ("arguments", "block_sums", "hidden_gradient", "huge_pages", "product", "softmax_tile", "weight_sum")
]
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wno-psabi"]

if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS = {
        "AVX2": ["-mavx2", "-mfma", "-mf16c"],
        "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    }
else:
    INSTRUCTION_SETS = {"DEFAULT": []}


def find_torch() -> Path | None:
    spec = PathFinder.find_spec("torch", [*sys.path, *(sysconfig.get_path(key) for key in ("purelib", "platlib"))])
    return Path(spec.origin).parent if spec and spec.origin else None


def extensions(torch: Path) -> list[Extension]:
    return [
        Extension(
            f"tbrm_kernels._cpu_{name.lower()}",
            sources=[SOURCE],
            depends=HEADERS,
            include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
            library_dirs=[str(torch / "lib")],
            # Not OpenMP's runtime: the library must share the one that torch has loaded.
            libraries=["torch_cpu", "c10"],
            define_macros=[("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None)],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,  # a failure to compile is a warning
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]


torch = find_torch() if sys.platform == "linux" else None
if torch is None:
    print("tbrm: no torch found, so the CPU kernels are not built", file=sys.stderr)
setup(ext_modules=extensions(torch) if torch else [])
