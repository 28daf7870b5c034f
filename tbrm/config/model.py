"""Keys of the model, its adapters and its chat template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from tbrm.config.section import ConfigError, Section
from tbrm.registry import GIVEN
from tbrm.storage.path_keys import ExpandedPath
from tbrm.storage.paths import is_path

if TYPE_CHECKING:
    import torch

_DEMO = "SmolLM2-135M-Instruct"
_WHENCE = {
    _DEMO: f"In a clone of tbrm `make demo` makes it; with a hub at hand, model.name=HuggingFaceTB/{_DEMO} is the same model",
}
"""Where folders come from that our recipes name."""


class ModelConfig(Section):
    name: ExpandedPath = Field(
        description="Hugging Face folder or hub name; 'tiny': a small random model made on the spot; 'given': an object "
        "(docs/python.md)."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    ignore_weights: list[str] = Field(
        [],
        description="Patterns (*, ?) of tensors in its files to read past, such as a vision tower. What is missing there, or "
        "has no place in the model, is an error.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the products; weights are float32. auto: bfloat16 where the processor has it (GPUs, "
        "AVX512-BF16, AMX).",
    )
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"] = Field(
        "auto",
        description="Attention in training. On a GPU in bfloat16, flash: flash-attn (pip install 'tbrm[gpu]'), varlen: torch's "
        "own, flex: its FlexAttention, compiled. sdpa: segment by segment, anywhere. auto: the first that is there and fits.",
    )
    layout: Literal["auto", "packed", "rows"] = Field(
        "auto",
        description="How trajectories are read. packed: without padding, shared prompts once; rows: a padded row each, with "
        "the model's own layers and cache. auto: packed where that is proved exact.",
    )
    compile: bool = Field(
        False,
        description="Run each block's norms and MLP through torch.compile; the first steps wait for it.",
    )
    device: str = Field(
        "auto", description="Device of the model: auto, cpu, cuda or cuda:N. auto takes a GPU where there is one."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off for good reason."
    )

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"got {device!r}; wants auto, cpu, cuda or cuda:N")
        return device

    def refuse_given(self) -> None:
        """Raises ConfigError where the model is an object, for those who have none."""
        if self.name == GIVEN:
            raise ConfigError(
                "model.name: given, which stands for an object of Python's: give it, tbrm.train(config, model=MODULE, "
                "tokenizer=TOKENIZER), or name a model"
            )

    def require_folder(self) -> None:
        """Raises ConfigError where the name is that of a folder, and none is there."""
        if not is_path(self.name) or Path(self.name).is_dir():
            return
        path = Path(self.name)
        what = "a file" if path.exists() else "not there"
        whence = "`tbrm import-gguf FILE OUT` makes one of a GGUF file" if path.exists() else _WHENCE.get(path.name)
        raise ConfigError(
            f"model.name: {self.name!r} is {what}; wants a folder (relative ones start at {Path.cwd()}). "
            f"{whence or 'A model of a hub is named OWNER/NAME'}"
        )

    def resolve_device(self) -> torch.device:
        """Raises ConfigError for a GPU that is not there."""
        import torch

        device, seen = self._device(), torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= seen:
            raise ConfigError(
                f"model.device: {self.device}; torch sees {seen or 'no'} GPU{'' if seen == 1 else 's'} here, counted from 0 "
                "(`tbrm doctor` says why): set it to auto or cpu"
            )
        return device

    def _device(self) -> torch.device:
        import torch

        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    def resolve_precision(self) -> torch.dtype:
        import torch

        from tbrm_kernels.backends.cpu import multiplies_bfloat16

        if self.precision == "auto":
            on_cpu = self._device().type == "cpu"
            return torch.float32 if on_cpu and not multiplies_bfloat16() else torch.bfloat16
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    def device_and_precision(self) -> tuple[torch.device, torch.dtype]:
        """As they would be, whether the device is there or not."""
        return self._device(), self.resolve_precision()


class LoraConfig(Section):
    rank: int = Field(
        0, ge=0, description="Rank of the adapters (pip install 'tbrm[lora]'); 0: all weights are trained."
    )
    alpha: float = Field(16.0, gt=0, description="What an adapter adds is scaled by alpha / rank.")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="Linear layers that get an adapter; lm_head is one where it is not tied to the embedding.",
    )


class ChatConfig(Section):
    plain: bool = Field(
        False,
        description="Prompts are plain text, messages parted by blank lines, whether or not the model has a chat template: "
        "for base models.",
    )
    template: str = Field(
        "",
        description="A Jinja template, as text or the path of a file, in the place of the model's own; checkpoints and exports "
        "have it then.",
    )
    template_kwargs: dict[str, Any] = Field(
        {},
        description="What the model's chat template takes beside messages and tools, such as {enable_thinking: false}.",
    )

    @model_validator(mode="after")
    def _one_choice(self) -> ChatConfig:
        if self.plain and (self.template or self.template_kwargs):
            other = "template" if self.template else "template_kwargs"
            raise ValueError(f"plain: true, and {other} is given, which plain text has no use for; leave either out")
        return self
