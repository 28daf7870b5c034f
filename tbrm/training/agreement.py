"""Whether all processes of a run were told the same: a rate, a data file or a version that differs on one machine would train a
mixture, to the end and without a word."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import transformers

import tbrm
import tbrm_kernels
from tbrm.config.recipe import config_to_dict
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.parallel import World
from tbrm.policy.attention_choice import NAMES, unusable
from tbrm.training.resolved import resolve
from tbrm.training.resume import leaves


def require_agreement(world: World, facts: Callable[[], dict[str, str]]) -> None:
    """All processes call it; `facts` gives values by name. Raises ConfigError, naming those in which a process differs from the
    main one, and what both have."""
    if world.size == 1:
        return
    told: dict[str, str] = {}

    def digest() -> str:
        told.update(facts())
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    if len(set(world.everywhere(digest))) == 1:
        return
    gathered = world.gather((socket.gethostname(), told))
    (first_host, first), others = gathered[0], gathered[1:]
    differences = [
        f"{key} is {has.get(key)} on rank {rank} ({host}) and {first.get(key)} on rank 0 ({first_host})"
        for rank, (host, has) in enumerate(others, start=1)
        for key in sorted(first.keys() | has.keys())
        if first.get(key) != has.get(key)
    ]
    raise ConfigError(
        f"the processes of the run were not told the same: {'; '.join(differences[:8])}. Start all with one recipe, the same "
        "files and the same installation"
    )


def facts_of(config: Config, command: Mapping[str, object]) -> dict[str, str]:
    """What must be the same everywhere: each key of the config and of the command line, what `auto` comes to, the files that
    all processes read, and the versions of what computes."""
    facts = {f"--{key}": str(value) for key, value in command.items()}
    facts |= {key: repr(value) for key, value in leaves(config_to_dict(config))}
    facts["what model.device comes to"] = config.model.resolve_device().type
    usable = [kind for kind in NAMES if not unusable(kind, *config.model.device_and_precision())]
    facts["what model.attention may come to"] = " or ".join(usable)
    # A hub's files may not be here yet; the trainer compares their revision.
    name = config.model.name if Path(config.model.name).is_dir() else "tiny"
    here = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    facts |= {f"what is in {key}": digest[:12] for key, digest in resolve(here).items()}
    for plugin in (config.objective, config.task):
        if plugin is not None:
            facts[f"the code of {plugin.name}"] = _hash([Path(inspect.getfile(type(plugin)))])
    for package in (tbrm, tbrm_kernels):
        facts[f"the code of {package.__name__}"] = _hash(sorted(Path(package.__path__[0]).rglob("*.py")))
    facts["torch"], facts["transformers"] = torch.__version__, transformers.__version__
    facts["Python"] = platform.python_version()
    return facts


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
