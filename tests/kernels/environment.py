"""An environment that holds some installed packages, what they require, and nothing else; its files are links to theirs."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


class Environment:
    def __init__(self, folder: Path, *packages: str) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        [site] = folder.glob("lib/python*/site-packages")
        for package in with_requirements(packages):
            root = Path(str(package.locate_file("")))
            names = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
            for name in names:
                if not (site / name).exists():
                    (site / name).symlink_to(root / name)

    def run(self, *arguments: str | Path, **options: str) -> str:
        """What a Python command prints, in a folder and with an environment that name nothing of ours."""
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PIP_CONFIG_FILE": "/dev/null", **options}
        command = [str(self.python), "-I", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.python.parents[1], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *what: str, **options: str) -> None:
        """By our pip, and from nowhere else: what the package requires must be there."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-index"]
        environment = {"PATH": "/usr/bin:/bin", **options}
        done = subprocess.run(
            [*pip, "--no-build-isolation", *what], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr


def with_requirements(packages: tuple[str, ...]) -> list[Distribution]:
    found: dict[str, Distribution] = {}
    wanted = list(packages)
    while wanted:
        name = re.split(r"[^A-Za-z0-9._-]", wanted.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        wanted += [text for text in found[name].requires or () if "extra ==" not in text]
    return list(found.values())
