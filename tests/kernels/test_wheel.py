"""What is installed where nobody has a checkout: a wheel with the kernels inside, or an sdist where there is no compiler."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import tbrm
from tbrm_kernels.backends.library import library_name
from tbrm_kernels.reference import token_stats_reference, trajectory_residual_reference
from tests.kernels.environment import Environment

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (shutil.which("g++") and sys.platform == "linux"), reason="no compiler")


NO_COMPILER = {"PATH": "/nonexistent", "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a checkout goes into an sdist."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "tbrm", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "_cpu_not*", "__pycache__"))
    shutil.copytree(ROOT / "src", copy / "src", symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    build = "from setuptools.build_meta import build_sdist; build_sdist('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, timeout=60)
    [file] = tree.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", str(sdist)]
    subprocess.run(pip, cwd=sdist.parent, check=True, capture_output=True, timeout=900)
    [file] = sdist.parent.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("alone"), "torch", "triton")
    environment.install(str(wheel))
    return environment


def test_a_wheel_holds_all_modules_and_the_kernels_and_names_its_platform(wheel: Path) -> None:
    assert re.fullmatch(rf"tbrm-{tbrm.__version__}-cp311-abi3-linux_{platform.machine()}\.whl", wheel.name)
    files = zipfile.ZipFile(wheel).namelist()
    sets = ["avx2", "avx512"] if platform.machine() == "x86_64" else ["default"]
    libraries = [f"tbrm_kernels/{library_name(name, torch.__version__)}.abi3.so" for name in sets]
    assert sorted(file for file in files if file.endswith((".so", ".txt")) and "dist-info" not in file) == libraries
    sources = {"tbrm": ROOT / "tbrm", "tbrm_kernels": ROOT / "kernels"}
    parts = [(name, path) for name, folder in sources.items() for path in folder.rglob("*")]
    held = {f"{name}/{p.relative_to(sources[name])}" for name, p in parts if p.suffix in {".py", ".html", ".typed"}}
    assert held == {file for file in files if file.endswith((".py", ".html", ".typed"))}


EXAMPLE = """
import sys
from importlib.util import find_spec
import torch, tbrm_kernels
assert tbrm_kernels.__file__.startswith(sys.prefix), tbrm_kernels.__file__
assert not [name for name in ("transformers", "pydantic", "yaml", "numpy", "safetensors", "tqdm") if find_spec(name)]
assert tbrm_kernels.backends("cpu")["cpu"] == type(tbrm_kernels.backends("cpu")["cpu"])(True, "")
torch.manual_seed(0)
names = {}
exec(sys.argv[1], names)
kept = ("hidden", "weight", "targets", "cu_seqlens", "ref_sums", "rewards", "out")
torch.save({name: names[name] for name in kept} | {"grads": [names["hidden"].grad, names["weight"].grad]}, sys.argv[2])
"""


def test_in_an_environment_of_torch_alone_readmes_example_has_the_gradient_of_the_definition(
    installed: Environment, tmp_path: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if "from tbrm_kernels import" in block]
    installed.run("-c", EXAMPLE, block, tmp_path / "found.pt")
    found: dict[str, Any] = torch.load(tmp_path / "found.pt", weights_only=False)
    hidden, weight = (found[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    logprobs, lse, _ = token_stats_reference(hidden, weight, found["targets"])
    of_reference = (found["ref_sums"].double(), found["rewards"].double())
    [beta] = re.findall(r"beta=([0-9.e-]+)", block)
    residuals = trajectory_residual_reference(logprobs, lse, found["cu_seqlens"], *of_reference, float(beta))
    residuals.square().mean().backward()
    lost = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[found["weight"].dtype]
    assert torch.dist(found["out"].residuals.double(), residuals) < lost * residuals.norm()
    for grad, exact in zip(found["grads"], (hidden.grad, weight.grad), strict=True):
        assert torch.dist(grad.double(), exact) < lost * exact.norm()


def test_without_the_trainers_packages_its_command_says_what_to_install(installed: Environment) -> None:
    tbrm_command = "import sys; from tbrm.commands.cli import main; sys.stderr = sys.stdout; print(main(sys.argv[1:]))"
    assert installed.run("-c", f"{tbrm_command}", "train", "recipe.yaml").endswith("pip install 'tbrm[train]'\n1\n")


REASON = "from tbrm_kernels import backends; print(backends('cpu')['cpu'].reason); assert backends()['torch'].usable"


def test_an_sdist_without_a_compiler_installs_and_says_what_is_missing(sdist: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "alone", "torch", "triton")
    environment.install(str(sdist), **NO_COMPILER)
    reason = environment.run("-c", REASON)
    assert re.match(r"its kernels could not be built \(.*/nonexistent/c\+\+.*\): install tbrm again", reason)


def test_a_wheel_built_where_no_torch_is_says_so_in_a_note(sdist: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path)
    [tree] = tmp_path.iterdir()
    environment = Environment(tmp_path / "bare", "setuptools")
    environment.run("-c", f"import os; os.chdir({str(tree)!r}); from setuptools.build_meta import *; build_wheel('.')")
    [wheel] = tree.glob("*.whl")
    assert zipfile.ZipFile(wheel).read("tbrm_kernels/_cpu_not_built.txt").startswith(b"no torch was installed")


def test_an_editable_install_is_a_path_which_type_checkers_follow_and_says_what_it_lacks(
    tree: Path, tmp_path: Path
) -> None:
    """They do not follow setuptools' import hooks."""
    environment = Environment(tmp_path / "alone", "torch", "triton")
    environment.install("--editable", str(tree), **NO_COMPILER)
    [path] = (tmp_path / "alone").rglob("__editable__*.pth")
    assert path.read_text() == f"{tree}/src\n"
    assert {path.parent.name for path in tree.glob("src/*/py.typed")} == {"tbrm", "tbrm_kernels"}
    assert "cpu    no: its kernels could not be built" in environment.run("-m", "tbrm_kernels")
