"""From a config's model section to a model: read from a folder or the hub, put on its device or cut over the processes."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tbrm.config.model import ModelConfig
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.parallel import ALONE, World
from tbrm.policy.attention_choice import NAMES, choose_attention
from tbrm.policy.hub import require_hub
from tbrm.policy.hub_folder import remember_dtype
from tbrm.policy.layout_choice import length_class, only_rows, settle_layout
from tbrm.policy.lora import CONFIG as ADAPTER_CONFIG
from tbrm.policy.lora import Adapters, has_adapters, load_merged
from tbrm.policy.model import PolicyModel
from tbrm.policy.model_files import ModelFiles
from tbrm.policy.named_weights import weights_of
from tbrm.policy.sharded import shard
from tbrm.policy.sharding import Sharding
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.policy.weights import materialise
from tbrm.reporting.progress import alive
from tbrm.trajectories.rows import LengthClass


def load_model(
    config: ModelConfig, seed: int, *, meta: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The transformers model, float32 on the CPU, and its tokenizer. `seed` initialises the built-in tiny model. A folder of
    LoRA adapters is the model they were made for, with them added to its weights.

    With `meta` a model from a folder or hub has no weights yet: it is on the meta device. Raises ValueError.
    """
    config.refuse_given()
    config.require_folder()
    if has_adapters(config.name):
        if meta:
            raise ValueError(
                f"model.name: {config.name!r} holds adapters, which one process must add to the model before several can share "
                "it: `tbrm export` writes the sum as a Hugging Face folder"
            )
        return load_merged(config, lambda base: load_model(base, seed))
    lm: Any  # transformers' types do not cover what its Auto classes return
    tokenizer: Any
    if config.name == "tiny":
        tokenizer = tiny_tokenizer()
        return tiny_model(len(tokenizer), seed), tokenizer
    require_hub(config)
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, **where)
        settings = AutoConfig.from_pretrained(config.name, **where)
        remember_dtype(settings)
        if getattr(settings, "quantization_config", None):
            raise ValueError(
                "its weights are quantised (quantization_config in config.json): de-quantise and save them first"
            )
        with torch.device("meta"):
            remote_code = {"trust_remote_code": config.trust_remote_code}
            lm = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, **remote_code)
        with suppress(OSError):  # it has none of its own: the model's config says it all
            lm.generation_config = GenerationConfig.from_pretrained(config.name, revision=config.revision or "main")
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(config, error) from error
    if not meta:
        files = weight_files(config, lm)
        materialise(lm, torch.device("cpu"), torch.device("cpu"))
        files.read(lm.state_dict(keep_vars=True))
    return lm, tokenizer


def weight_files(config: ModelConfig, lm: PreTrainedModel) -> ModelFiles:
    """Those that hold the weights of `lm`, which is on the meta device. Raises ValueError if they do not."""
    try:
        folder = Path(config.name)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG]
            folder = Path(snapshot_download(config.name, revision=config.revision, allow_patterns=patterns))
            if has_adapters(str(folder)):
                raise ValueError("it holds adapters; download them to a folder, and name that")
        return ModelFiles(lm, folder, config.ignore_weights)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(config, error) from error


def _cannot_be_loaded(config: ModelConfig, error: Exception) -> ValueError:
    if "trust_remote_code" in str(error):
        return ValueError(
            f"model.name: {config.name!r} brings Python code of its own, which is not run unasked: read it, and give "
            "model.trust_remote_code=true"
        )
    return ValueError(
        f"model.name: {config.name!r} cannot be loaded: {error}\nGive a Hugging Face folder with safetensors, a hub name "
        "(needs the network), or 'tiny'. `tbrm import-gguf FILE OUT` makes a folder of a GGUF file."
    )


def load_policy(
    config: Config,
    world: World = ALONE,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PolicyModel, PreTrainedTokenizerBase]:
    """The config's model, or the one given in its place, on its device, or sharded over the processes, checked, and its
    tokenizer.

    No process of several ever holds all of a model that is read from files.
    """
    with alive(f"loading {config.model.name}", shown=world.is_main):
        return _load_policy(config, world, model, tokenizer)


def _load_policy(
    config: Config, world: World, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PolicyModel, PreTrainedTokenizerBase]:
    device, precision = config.model.resolve_device(), config.model.resolve_precision()
    if model is None or tokenizer is None:
        alone = world.mesh is None
        lm, tokenizer = load_model(config.model, config.seed, meta=not (alone and has_adapters(config.model.name)))
    else:
        remember_dtype(model.config)
        lm = model.float()
    files = weight_files(config.model, lm) if lm.device.type == "meta" else None
    adapters = Adapters(lm, config.lora, config.model, config.seed) if config.lora.rank else None
    policy = PolicyModel(
        lm,
        temperature=config.rollout.temperature,
        precision=precision,
        attention=NAMES[choose_attention(config.model, lm)],
        compiled=config.model.compile,
        rows=_rows(config.model, lm),
    )
    policy.adapters = adapters
    if config.parallel.activation_checkpointing:
        policy.checkpoint_activations()
    if world.mesh is not None:
        shard(policy, Sharding(world.mesh, config.parallel, precision))
    elif files is not None:
        materialise(lm, device, device)
    else:
        policy = policy.to(device)
    if files is not None:
        files.read(weights_of(policy))
    if adapters is not None:
        adapters.reset()
    if (told := settle_layout(policy, config.model)) and world.is_main:
        print(told, file=sys.stderr)
    set_day(tokenizer, date.today())
    return policy, tokenizer


def _rows(config: ModelConfig, lm: PreTrainedModel) -> LengthClass | None:
    """Which rows may stand side by side, if the model is to be read in rows from the start."""
    reason = only_rows(lm)
    if config.layout == "packed" and reason:
        raise ConfigError(f"model.layout: packed, and {type(lm).__name__} cannot be: {reason}; set it to auto")
    return length_class(lm) if config.layout == "rows" or (config.layout == "auto" and reason) else None


def set_day(tokenizer: Any, day: date) -> None:
    """From now on templates that name the day (Llama 3.2, Mistral, gpt-oss) name this one, or a run's prompts would change at
    midnight. It goes with the tokenizer and its copies: `load_policy` sets the day of loading, and the trainer that on which
    its run began, which checkpoints keep."""
    tokenizer.chat_day = day


def find_model(name: str) -> tuple[str, str]:
    """What to load for a model's name, and that in words: the name itself or, for the folder of a run, that of its best
    checkpoint, else its latest. Raises ValueError."""
    for link in ("best", "latest"):
        folder = Path(name) / "checkpoints" / link
        if folder.exists():
            taken = str(folder.resolve())  # the link may move on while the model is read
            why = "" if link == "best" else "; it has no best, as no evaluation was better than that before training"
            return taken, f"{taken}, the {link} of {name}{why}"
    if (Path(name) / "metrics.jsonl").is_file():
        raise ValueError(f"{name} is a run that has no checkpoint yet (checkpoint.every)")
    return name, name
