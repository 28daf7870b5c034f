"""What a Hugging Face folder holds beside the weights, so that transformers 4 reads it as transformers 5 does.

transformers 5 writes some settings under new names alone. The old version finds none of them, and takes its defaults without
a word: another base of the rotary angles, say. So each stands under its old name too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save

from tbrm.storage.files import open_to_umask

_OWN_DTYPE = "dtype_before_training"
"""In a checkpoint's config, as its weights are float32 whatever the model came in."""


def remember_dtype(config: PreTrainedConfig) -> None:
    """Notes in a config as it was read what the model's files hold, if that is not an earlier run's note."""
    if not hasattr(config, _OWN_DTYPE):
        setattr(config, _OWN_DTYPE, str(config.dtype or torch.float32).removeprefix("torch."))


def own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """What the model's files held before it was trained."""
    dtype: torch.dtype = getattr(torch, getattr(config, _OWN_DTYPE, "float32"))
    return dtype


def save_config(lm: PreTrainedModel, folder: Path) -> None:
    """Also the generation config, and the code of a model that came with its own."""
    config = copy.deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    if lm._auto_class is not None:
        custom_object_save(lm, folder, config=config)
    config.save_pretrained(folder)
    if lm.generation_config is not None:
        lm.generation_config.save_pretrained(folder)
    _finish_config(folder)


def write_folder(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: torch.dtype) -> None:
    """Makes `out`, which is not there yet: config, weights as `dtype`, and tokenizer. A kill half-way leaves no folder of that
    name, which would look complete."""
    unfinished = out.with_name(out.name + ".unfinished")
    save_model(lm, unfinished, dtype)
    save_tokenizer(tokenizer, unfinished)
    unfinished.rename(out)


def save_model(lm: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Config and weights, these as `dtype` but for those that transformers itself keeps in float32."""
    exempt = {*(lm._keep_in_fp32_modules or ()), *(lm._keep_in_fp32_modules_strict or ())}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or any(part in name for part in exempt):
            continue
        rounded = tensor.data.to(dtype)
        if tensor.isfinite().all() and not rounded.isfinite().all():
            raise ValueError(f"--dtype: {name} has values beyond those of {dtype}; give bfloat16 or float32")
        tensor.data = rounded
    if hasattr(lm.config, _OWN_DTYPE):
        delattr(lm.config, _OWN_DTYPE)
    # A checkpoint has the names of the model in memory, so that none were changed when it was read, nor would be now.
    setattr(lm, "_weight_conversions", getattr(lm, "_weight_conversions", None) or None)  # noqa: B010
    lm.save_pretrained(folder)
    _finish_config(folder)
    for path in folder.glob("*.safetensors"):
        open_to_umask(path)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)

    def older(settings: dict[str, Any]) -> None:
        if "extra_special_tokens" in settings and isinstance(settings["extra_special_tokens"], list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        if isinstance(tokenizer, PreTrainedTokenizerFast) and "auto_map" not in settings:
            # Read as it stands in tokenizer.json: transformers 4 rebuilds parts of it for classes with a name of their own.
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings["model_input_names"] = list(tokenizer.model_input_names)
            settings["padding_side"] = tokenizer.padding_side

    _rewrite(folder / "tokenizer_config.json", older)


def _finish_config(folder: Path) -> None:
    def finish(settings: dict[str, Any]) -> None:
        _add_old_names(settings)
        # A model that transformers knew, and whose own code was not run, has left that behind.
        code = settings.pop("auto_map", {})
        present = {
            auto: name for auto, name in code.items() if "--" in name or (folder / f"{name.split('.')[0]}.py").exists()
        }
        settings |= {"auto_map": present} if present else {}

    _rewrite(folder / "config.json", finish)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _add_old_names(settings: dict[str, Any]) -> None:
    """To a config, and to the configs within it."""
    for part in settings.values():
        if isinstance(part, dict) and "model_type" in part:
            _add_old_names(part)
    if "dtype" in settings:
        settings["torch_dtype"] = settings["dtype"]
    if settings.get("model_type") == "qwen3_moe":
        settings["num_experts"] = settings["num_local_experts"]
    rope = settings.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if "rope_theta" in full:
        settings |= _old_rope(settings.get("model_type", ""), full, local)


def _old_rope(model_type: str, full: dict[str, Any], local: dict[str, Any] | None) -> dict[str, Any]:
    """Settings of the rotary angles, those of local layers perhaps apart, under transformers 4's names."""
    apart = ("rope_theta", "partial_rotary_factor")
    old = {key: full[key] for key in apart if key in full}
    scaling = {key: value for key, value in full.items() if key not in apart}
    if full["rope_type"] == "longrope":
        old["original_max_position_embeddings"] = full["original_max_position_embeddings"]
        if model_type.startswith("phi"):  # which refuse any other key
            scaling = {"type": "longrope", "short_factor": full["short_factor"], "long_factor": full["long_factor"]}
    if model_type.startswith("gpt_neox"):
        old |= {"rotary_emb_base": full["rope_theta"], "rotary_pct": full["partial_rotary_factor"]}
    if model_type.startswith("modernbert") and local:
        return old | {"global_rope_theta": full["rope_theta"], "local_rope_theta": local["rope_theta"]}
    if local:
        old["rope_local_base_freq"] = local["rope_theta"]
    return old | {"rope_scaling": scaling if full["rope_type"] != "default" else None}
