"""LoRA through `peft`: the weights of the model stay as they are, and each chosen layer learns W + alpha / rank * B A.

B begins as zero, so the policy begins as the model itself, which is also what it is with its adapters off: the reference needs
no second copy of the weights.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tbrm.config.model import LoraConfig, ModelConfig
from tbrm.policy.weights import whole
from tbrm.storage.files import save_tensors
from tbrm.storage.paths import is_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's own, of the one adapter of each layer
_SWITCHING = threading.Lock()
"""Held while adapters are off, or must be on. One for all models: a model with a lock in it could not be copied."""


class Adapters:
    """The adapters of a model, which from now on are all that is trained of it. Raises ValueError where they cannot be."""

    def __init__(self, lm: PreTrainedModel, config: LoraConfig, model: ModelConfig, seed: int) -> None:
        peft = _peft("lora.rank")
        head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
        self.config = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=config.targets,
            task_type="CAUSAL_LM",
            # Absolute, and without links such as a run's `best`, which may come to mean another model.
            base_model_name_or_path=str(Path(model.name).resolve()) if is_path(model.name) else model.name,
            revision=model.revision,
        )
        for target in config.targets:
            matched = [module for name, module in lm.named_modules() if name == target or name.endswith(f".{target}")]
            if not matched or not all(isinstance(module, nn.Linear) for module in matched):
                raise ValueError(
                    f"lora.targets: {target!r} is no linear layer of {type(lm).__name__}; name some of "
                    f"{', '.join(_linear_layers(lm))}"
                )
            if head in matched and head.weight is embedding.weight:
                raise ValueError(
                    f"lora.targets: {target!r} is tied to the embedding in {type(lm).__name__}, and an adapter would untie "
                    "them; leave it out, or train all weights (lora.rank 0)"
                )
        on_meta = lm.device.type == "meta"
        peft.inject_adapter_in_model(self.config, lm, low_cpu_mem_usage=on_meta)
        self.layers = [module for module in lm.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        self._seed = seed

    @torch.no_grad()
    def reset(self) -> None:
        """Gives them the values they begin with, the same for the same seed on any number of processes."""
        generator = torch.Generator().manual_seed(self._seed)
        for layer in self.layers:
            down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
            nn.init.zeros_(up)
            value = nn.init.kaiming_uniform_(torch.empty(down.shape), a=math.sqrt(5), generator=generator)
            if isinstance(down, DTensor):
                value = distribute_tensor(value, down.device_mesh, down.placements, src_data_rank=None)
            down.copy_(value)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the model is what it was without them: for all threads."""
        with _SWITCHING:
            self._switch(False)
            try:
                yield
            finally:
                self._switch(True)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it no other thread turns them off."""
        with _SWITCHING:
            yield

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.enable_adapters(on)
            # peft also freezes what it switches off, and a sharded weight that is frozen when it is first gathered stays so.
            for matrix in (layer.lora_A, layer.lora_B):
                matrix.requires_grad_(True)

    def merged(self, name: str, weight: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
        """A weight of the model, whole, with what is learnt added to it, if its layer has an adapter. `adapters` are all of
        them by peft's names, perhaps in slices: all processes ask for the same weight together."""
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        up, down = (adapters.get(f"{layer}.lora_{which}.weight") for which in "BA")
        if up is None or down is None:
            return weight
        scaling = self.config.lora_alpha / self.config.r
        return torch.addmm(weight.float(), whole(up).float(), whole(down).float(), alpha=scaling)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes them as peft does; `weights` under peft's names."""
        self.config.save_pretrained(folder)
        save_tensors({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


def is_adapter(name: str) -> bool:
    """Whether a weight of the model is an adapter's, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def saved_name(name: str) -> str:
    """What peft calls an adapter's weight in a file."""
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"


def base_layer(module: nn.Module) -> nn.Module:
    """The layer itself, without an adapter."""
    layer: nn.Module = getattr(module, "base_layer", module)
    return layer


def adapted_weight(module: Any, weight: Tensor, rows: slice = slice(None)) -> Tensor:
    """W + alpha / rank * B A of a layer, given (some rows of) W; W itself where there is no adapter, or it is off."""
    if base_layer(module) is module or module.disable_adapters:
        return weight
    up, down = module.lora_B[_NAME].weight[rows], module.lora_A[_NAME].weight
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=module.scaling[_NAME])


def has_adapters(folder: str) -> bool:
    return (Path(folder) / CONFIG).is_file()


def load_merged(
    config: ModelConfig, load_base: Callable[[ModelConfig], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the adapters of a folder were made for, with them added to its weights, and the tokenizer that lies beside
    them, or else the model's. Raises ValueError."""
    peft = _peft(f"model.name: {config.name!r} holds adapters, and")
    folder = Path(config.name)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"model.name: {config.name!r} has {CONFIG} but no {WEIGHTS}; save the adapters as safetensors")
    settings = json.loads((folder / CONFIG).read_text())
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind != "LORA" or not base:
        raise ValueError(
            f"model.name: {config.name!r} holds adapters of type {kind} for the model {base}; wants LORA, and a model's name"
        )
    name = base_of(folder, base)
    try:
        lm, tokenizer = load_base(config.model_copy(update={"name": name, "revision": settings.get("revision")}))
    except ValueError as error:
        raise ValueError(f"model.name: {config.name!r} holds adapters for another model: {error}") from error
    _resize_vocabulary(lm, folder)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    adapted = peft.PeftModel.from_pretrained(lm, config.name)
    wanted = {name for name in peft.get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in name}
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 (it is no mapping)
    if wanted != found:
        raise ValueError(
            f"model.name: {config.name!r}: {WEIGHTS} does not hold the adapters that {CONFIG} describes for {base}: "
            f"missing {sorted(wanted - found)}, without a place {sorted(found - wanted)}"
        )
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.requires_grad_(True), tokenizer


def base_of(folder: Path, base: str) -> str:
    """The name of the model that adapters are for. A relative path starts at their folder, or at the working directory, as
    peft has it."""
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"model.name: {str(folder)!r} holds adapters for the model in {base}, which is not there: put it there again, or "
            f"a link to it"
        )
    if (folder / base).is_dir():
        return str((folder / base).resolve())
    if is_path(base) and not Path(base).is_dir():
        raise ValueError(
            f"model.name: {str(folder)!r} holds adapters for the model {base!r}, a relative path, which is neither in their "
            f"folder nor in {Path.cwd()}: make base_model_name_or_path in {CONFIG} absolute"
        )
    return base


def _resize_vocabulary(lm: PreTrainedModel, folder: Path) -> None:
    """Gives the model as many tokens as the one had that was trained: new ones come with an embedding beside the adapters."""
    embedding: Any = lm.get_input_embeddings()
    name = next(name for name, module in lm.named_modules() if module is embedding)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for saved in (f"base_model.model.{name}.weight", f"base_model.model.{name}.base_layer.weight"):
            if saved in file.keys():  # noqa: SIM118
                rows = file.get_slice(saved).get_shape()[0]
                if rows != embedding.weight.shape[0]:
                    lm.resize_token_embeddings(rows)


def _linear_layers(lm: PreTrainedModel) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if isinstance(module, nn.Linear)})


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModuleNotFoundError(f"{what} needs peft: pip install 'tbrm[lora]'") from error
    return peft
