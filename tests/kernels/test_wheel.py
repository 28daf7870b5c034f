"""What a wheel holds. The sources are replaced by an empty one: building the real ones takes a minute."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = {"_cpu_avx2", "_cpu_avx512"} if platform.machine() == "x86_64" else {"_cpu_default"}

pytestmark = pytest.mark.skipif(not (shutil.which("g++") and sys.platform == "linux"), reason="no compiler")


@pytest.mark.parametrize(
    ("source", "libraries"),
    [pytest.param("", LIBRARIES, id="kernels"), pytest.param("#error", set(), id="a compiler that fails")],
)
def test_a_wheel_holds_all_modules_and_the_kernels_if_they_can_be_built(
    source: str, libraries: set[str], tmp_path: Path
) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "tbrm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/head.cpp").write_text(source)
    for header in ROOT.glob("csrc/*.h"):
        shutil.copy(header, tmp_path / "csrc")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "."]
    subprocess.run(pip, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {Path(file).name.partition(".")[0] for file in files if file.endswith(".so")} == libraries
    assert all(file.startswith("tbrm_kernels/") for file in files if file.endswith(".so"))
    sources = {"tbrm": ROOT / "tbrm", "tbrm_kernels": ROOT / "kernels"}
    parts = [(name, path) for name, folder in sources.items() for path in folder.rglob("*")]
    held = {f"{name}/{p.relative_to(sources[name])}" for name, p in parts if p.suffix in {".py", ".html", ".typed"}}
    assert held <= set(files)
