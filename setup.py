"""Builds the CPU kernels of csrc/, one library per instruction set; tbrm_kernels loads the one for the processor it runs on.

They need torch's headers and libraries. pip builds in an isolated environment, which has no torch, so the torch that is
installed where this package is going is looked for too. Without torch or a compiler the package is installed without
them, and `tbrm_kernels.backends()` says so.

Each library is named by the torch it is built with, since torch promises no other one its C++ interface (what it calls stable
lacks the vectors and products that the kernels are made of); tbrm_kernels loads none of another. Of Python it uses nothing.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
from copy import copy
from importlib.machinery import PathFinder
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

SOURCE = "csrc/head.cpp"
HEADERS = [
    f"csrc/{name}.h"
    for name in ("arguments", "block_sums", "hidden_gradient", "huge_pages", "product", "softmax_tile", "weight_sum")
]
FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wno-psabi"]
_names = run_path("src/tbrm_kernels/backends/library.py")
library_name, NOTE = _names["library_name"], _names["NOTE"]

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


def version_of(torch: Path | None) -> str:
    return run_path(str(torch / "version.py"))["__version__"] if torch else "none"


def extensions(torch: Path | None) -> list[Extension]:
    return [
        Extension(
            f"tbrm_kernels.{library_name(name, version_of(torch))}",
            sources=[SOURCE],
            depends=HEADERS,
            include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")] if torch else [],
            library_dirs=[str(torch / "lib")] if torch else [],
            # Not OpenMP's runtime: the library must share the one that torch has loaded.
            libraries=["torch_cpu", "c10"],
            define_macros=[("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None)],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,  # a failure to compile is a warning
            py_limited_api=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]


class BuildKernels(build_ext):
    """All at once, each with objects of its own, since they come of one source."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = len(INSTRUCTION_SETS)

    def build_extension(self, ext: Extension) -> None:
        own = copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        try:
            if TORCH is None:
                raise CompileError("no torch was installed where tbrm was going")
            super(BuildKernels, own).build_extension(ext)
        except (BaseError, CCompilerError, CompileError) as error:
            note = Path(self.build_lib, "tbrm_kernels", NOTE)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(error))
            raise

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        note, inplace = Path(self.build_lib, "tbrm_kernels", NOTE), Path("src/tbrm_kernels", NOTE)
        inplace.unlink(missing_ok=True)
        if note.exists():
            self.copy_file(str(note), str(inplace))


TORCH = find_torch()
setup(
    ext_modules=extensions(TORCH) if sys.platform == "linux" else [],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
