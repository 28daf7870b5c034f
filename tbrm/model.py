"""The policy: a transformers backbone whose head is `linear_token_stats`, so that [tokens, vocabulary] logits never exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tbrm.attention import PACKED_ATTENTION
from tbrm.config import Config, ModelConfig
from tbrm.data import Trajectory, TrajectoryBatch, pack
from tbrm.tiny import tiny_model, tiny_tokenizer
from tbrm_kernels import TokenStats, TrajectoryLossFn, fused_linear_trajectory_loss, linear_token_stats


class PolicyModel(nn.Module):
    """Token statistics of packed trajectories under any transformers causal language model.

    The logits are what the model itself would compute (its head's bias, logit scale and soft-cap included), divided by
    `temperature`: Q(s, a) of the paper. Only positions that predict an action reach the head.
    """

    def __init__(
        self, lm: PreTrainedModel, *, temperature: float = 1.0, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        text_config = lm.config.get_text_config()
        self.lm = lm.eval()  # dropout would make Q, and with it the residual, noise
        self.temperature = temperature
        self.precision = precision
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(text_config)
        # What transformers itself would use: SDPA cannot soft-cap attention scores.
        self._plain_attention = "eager" if getattr(text_config, "attn_logit_softcapping", None) else "sdpa"
        lm.set_attn_implementation(PACKED_ATTENTION)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def forward(self, batch: TrajectoryBatch, *, entropy: bool = False) -> TokenStats:
        """Statistics of the batch's A actions, [A] float32 each, in the order of `batch.targets`."""
        with self.autocast():
            return linear_token_stats(**self._head_inputs(batch), entropy=entropy)

    def trajectory_loss(self, batch: TrajectoryBatch, loss_fn: TrajectoryLossFn) -> tuple[Tensor, TokenStats]:
        """The sum of `loss_fn` over the batch's trajectories, in a single pass over the head (see
        `fused_linear_trajectory_loss`), and the statistics of its actions, entropy included, without gradient."""
        with self.autocast():
            return fused_linear_trajectory_loss(
                **self._head_inputs(batch), cu_seqlens=batch.cu_seqlens, loss_fn=loss_fn, entropy=True
            )

    def _head_inputs(self, batch: TrajectoryBatch) -> dict[str, Any]:
        backbone = self.lm.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            segments=batch.segments,
            use_cache=False,
        )
        head = self.lm.get_output_embeddings()
        return {
            "hidden": backbone.last_hidden_state[0, batch.action_rows],
            "weight": head.weight,
            "targets": batch.targets,
            "bias": head.bias,
            "temperature": self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the model's products; statistics and weights stay float32."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            yield

    @contextmanager
    def generation_mode(self) -> Iterator[PreTrainedModel]:
        """The transformers model with its usual attention, for `generate`."""
        self.lm.set_attn_implementation(self._plain_attention)
        try:
            with self.autocast():
                yield self.lm
        finally:
            self.lm.set_attn_implementation(PACKED_ATTENTION)

    @torch.no_grad()
    def check_architecture(self) -> None:
        """Compares a few packed tokens with the model's own logits. Raises ValueError where they differ.

        A model may do something to its logits or its attention that we do not know of; training it would go wrong in
        silence.
        """
        vocabulary = self.lm.get_output_embeddings().weight.shape[0]
        ids = torch.arange(3, 15).mul(7919).remainder(vocabulary).tolist()
        # The first two share a prompt, and all three what it begins with.
        pairs = [(ids[:4], ids[4:9]), (ids[:4], ids[9:]), (ids[:2] + ids[6:8], ids[1:5])]
        trajectories = [Trajectory(prompt, response, reward=0.0) for prompt, response in pairs]
        packed = self(pack(trajectories).to(self.device)).logprobs.float()
        own = []
        with self.generation_mode() as lm:
            for prompt, response in pairs:
                tokens = torch.tensor([[*prompt, *response]], device=self.device)
                logits = lm(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                targets = tokens[0, len(prompt) :, None]
                own.append((logits / self.temperature).log_softmax(-1).gather(1, targets)[:, 0])
        gap = (packed - torch.cat(own)).abs().max().item()
        low_precision = torch.bfloat16 in (self.precision, self.lm.dtype)
        if not gap <= (0.5 if low_precision else 0.01) / min(1.0, self.temperature):
            raise ValueError(
                f"model.name: {type(self.lm).__name__} is not supported: packed token log-probs differ from the model's own by "
                f"{gap:.3g}. Its head or its attention does something tbrm does not know of (linear attention, a scaled hidden "
                "state, attention sinks); use another model, or report it"
            )

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a normal Hugging Face folder (safetensors)."""
        self.lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Takes the weights of a folder that `save` wrote."""
        saved = type(self.lm).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        self.lm.load_state_dict(saved.state_dict())


def load_model(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The transformers model, float32 on the CPU, and its tokenizer. `seed` initialises the built-in tiny model."""
    lm: Any  # transformers' types do not cover what its Auto classes return
    tokenizer: Any
    if config.name == "tiny":
        tokenizer = tiny_tokenizer()
        return tiny_model(len(tokenizer), seed), tokenizer
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, **where)
        lm = AutoModelForCausalLM.from_pretrained(config.name, dtype=torch.float32, use_safetensors=True, **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name: {config.name!r} cannot be loaded: {error}\nGive a Hugging Face folder with safetensors, a hub name "
            "(needs the network), or 'tiny'. `tbrm import-gguf FILE OUT` makes a folder of a GGUF file."
        ) from error
    return lm, tokenizer


def load_policy(config: Config) -> tuple[PolicyModel, PreTrainedTokenizerBase]:
    """The config's model on its device, checked, and its tokenizer."""
    lm, tokenizer = load_model(config.model, config.seed)
    policy = PolicyModel(
        lm,
        temperature=config.rollout.temperature,
        precision=config.model.resolve_precision(),
    ).to(config.model.resolve_device())
    policy.check_architecture()
    return policy, tokenizer


def resolve_model(name: str) -> str:
    """A model's name as it is, or, for the folder of a run, its best checkpoint, else its latest."""
    checkpoints = Path(name) / "checkpoints"
    for link in ("best", "latest"):
        if (checkpoints / link).exists():
            return str(checkpoints / link)
    return name


def _logit_scale(config: object) -> float:
    """What the model multiplies its logits by: Cohere says `logit_scale`, Granite divides by `logits_scaling`."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
