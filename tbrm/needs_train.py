"""Imported first by every room of the trainer: `pip install tbrm` brings the kernels alone, and this says so in one line."""

from importlib.util import find_spec

_PACKAGES = ("pydantic", "transformers", "safetensors", "yaml", "jinja2", "numpy", "tqdm")
"""Those without which none of the rooms can be imported. (What one command alone wants is imported by that one.)"""

if missing := [name for name in _PACKAGES if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"the trainer needs packages that are not installed ({', '.join(missing)}): pip install 'tbrm[train]'",
        name=missing[0],
    )
