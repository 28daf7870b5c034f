"""A checkpoint, whatever number of processes wrote it, to a normal Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tbrm.config.recipe import load_sections
from tbrm.config.section import ConfigError
from tbrm.policy.hub_folder import own_dtype, write_folder
from tbrm.policy.load import find_model, load_policy
from tbrm.training.checkpoint import Checkpoint


def export(source: str, out: Path, dtype: torch.dtype | None = None, overrides: Sequence[str] = ()) -> str:
    """Writes the checkpoint `source`, or the best one of the run `source`, as `out`: config, safetensors and tokenizer. The
    weights are as the model's were before training, if no `dtype` is given. Returns a line that says what was written.

    Raises ConfigError or CheckpointError if it is no checkpoint, or a damaged one, or if `out` is there already.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; delete it, or name another folder")
    name, taken = find_model(source)
    checkpoint = Checkpoint(Path(name).resolve())
    policy, tokenizer = load_policy(
        load_sections(None, overrides, model={"name": str(checkpoint.folder), "device": "cpu"})
    )
    dtype = dtype or own_dtype(policy.lm.config)
    write_folder(policy.lm, tokenizer, out, dtype)
    kind = str(dtype).removeprefix("torch.")
    return f"{out} is ready: a Hugging Face folder of step {checkpoint.state.step}, as {kind} ({taken})"
