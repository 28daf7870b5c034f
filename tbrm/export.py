"""A checkpoint, whatever number of processes wrote it, to a normal Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from tbrm.checkpoint import Checkpoint
from tbrm.config import ConfigError
from tbrm.load import load_policy, resolve_model
from tbrm.recipe import load_sections


def export(source: str, out: Path) -> None:
    """Writes the checkpoint `source`, or the best one of the run `source`, as `out`: config, safetensors and tokenizer.

    Raises ConfigError or CheckpointError if it is no checkpoint, or a damaged one, or if `out` is there already.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; delete it, or name another folder")
    checkpoint = Checkpoint(Path(resolve_model(source)).resolve())
    policy, tokenizer = load_policy(load_sections(None, model={"name": str(checkpoint.folder), "device": "cpu"}))
    unfinished = out.with_name(out.name + ".unfinished")  # a kill half-way must not leave a folder that looks complete
    policy.lm.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)
