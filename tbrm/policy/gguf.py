"""GGUF to a normal Hugging Face folder: for machines without a model hub, where models come as single files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbrm.policy.hub_folder import write_folder


def import_gguf(file: Path, out: Path) -> None:
    """Writes `file`, de-quantised to float32, as `out`: config, generation config, safetensors and tokenizer.

    Any architecture whose GGUF files transformers reads. Raises ValueError if the file is missing or not such a file,
    or if `out` is there already.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"reading GGUF files needs the package {package}: pip install 'tbrm[gguf]'")
    if not file.is_file():
        raise ValueError(f"{file} is no file; give the path of a .gguf file")
    if out.exists():
        raise ValueError(f"{out} exists already; delete it, or name another folder")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read: Any  # the types of transformers do not know that there are two things
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as GGUF: {error}") from error
    quantised, found = read
    if wrong := {what: sorted(map(str, names)) for what, names in found.items() if names}:
        raise ValueError(f"{file} is not the {type(quantised).__name__} that it says it is: {wrong}")

    # transformers will not save a model that it de-quantised, so the weights move to a fresh one of the same class.
    values = quantised.config.to_dict()
    values.pop("quantization_config", None)
    model = type(quantised)(type(quantised.config).from_dict(values))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config

    write_folder(model, tokenizer, out, torch.float32)
