"""The policy: a transformers backbone whose head is `linear_token_stats`, so that [tokens, vocabulary] logits never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

from tbrm.policy.compiled import compile_around_attention
from tbrm.policy.lora import Adapters, adapted_weight
from tbrm.policy.packed_attention import PACKED_ATTENTION
from tbrm.policy.sharding import Sharding
from tbrm.policy.vocab_parallel import DividedVocabulary, VocabParallelPass
from tbrm.trajectories.batch import TrajectoryBatch
from tbrm.trajectories.layout import Layout, Packing, Rows
from tbrm.trajectories.rows import LengthClass
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import TokenStats, TrajectoryLossFn, fused_linear_trajectory_loss, linear_token_stats


class PolicyModel(nn.Module):
    """Token statistics of packed trajectories under any transformers causal language model.

    The logits are what the model itself would compute (its head's bias, logit scale and soft-cap included), divided by
    `temperature`: Q(s, a) of the paper. Only positions that predict an action reach the head.

    attention: the name of one that takes packed batches; see `tbrm.policy.attention_choice`.
    rows: given, each trajectory has a row of its own, beside others of its class; see `tbrm.policy.layout_choice`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        temperature: float = 1.0,
        precision: torch.dtype = torch.float32,
        attention: str = PACKED_ATTENTION,
        compiled: bool = False,
        rows: LengthClass | None = None,
    ) -> None:
        super().__init__()
        text_config = lm.config.get_text_config()
        self.lm = lm.eval()  # dropout would make Q, and with it the residual, noise
        self.temperature = temperature
        self.precision = precision
        self.attention = attention
        self.compiled = compiled
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(text_config)
        # The transformer blocks: what is gathered, and what is computed again, as a whole.
        self.blocks = [module for module in lm.modules() if type(module).__name__ in (lm._no_split_modules or ())]
        if compiled:
            compile_around_attention(self.blocks)
        self.sharding: Sharding | None = None
        self.adapters: Adapters | None = None
        """Which are all that is trained, if there are any."""
        self.vocabulary: DividedVocabulary | None = None
        """Embedding and head, where the vocabulary is divided over processes."""
        # What transformers itself would use: SDPA cannot soft-cap attention scores.
        self.plain_attention = "eager" if getattr(text_config, "attn_logit_softcapping", None) else "sdpa"
        if not lm._supports_sdpa:
            self.plain_attention = "eager"
        self.layout: Layout = Packing()
        if rows is None:
            lm.set_attn_implementation(attention)
        else:
            self.take_rows(rows)

    @property
    def in_rows(self) -> bool:
        """Whether each trajectory has a row of its own."""
        return isinstance(self.layout, Rows)

    def take_rows(self, class_of: LengthClass) -> None:
        """From now on each trajectory has a row of its own, with the model's own attention."""
        self.layout, self.attention = Rows(class_of), self.plain_attention
        self.lm.set_attn_implementation(self.attention)

    @property
    def device(self) -> torch.device:
        return self.lm.device if self.sharding is None else self.sharding.device

    def forward(
        self,
        batch: TrajectoryBatch,
        loss_fn: TrajectoryLossFn | None = None,
        *,
        entropy: bool = False,
        see: Callable[[Tensor], None] | None = None,
    ) -> TokenStats | tuple[Tensor, TokenStats]:
        """Statistics of the batch's A actions, [A] float32 each, in the order of `batch.targets`; given `loss_fn`, what
        `trajectory_loss` returns. `see` is shown the hidden states [A, D] that predict them. The head's weight is a whole
        tensor in here alone, where the processes have gathered it."""
        with self.autocast():
            together = None if self.vocabulary is None else VocabParallelPass(self.vocabulary, batch)
            hidden = batch.inputs.run(self.lm, None if together is None else together.embed())
            if see is not None:
                see(hidden)
            if together is None:
                return self._head(hidden, batch.targets, batch.cu_seqlens, loss_fn, entropy)
            loss_of_mine = together.loss_of_mine(loss_fn) if loss_fn else None
            hidden = together.gather(hidden)
            found = self._head(hidden, together.targets, together.cu_seqlens, loss_of_mine, entropy, together)
            return together.mine(found) if isinstance(found, TokenStats) else (found[0], together.mine(found[1]))

    def states(self, batch: TrajectoryBatch) -> Tensor:
        """[A, D]: the hidden states that predict the batch's actions."""
        with self.autocast():
            return batch.inputs.run(self.lm)

    def trajectory_loss(self, batch: TrajectoryBatch, loss_fn: TrajectoryLossFn) -> tuple[Tensor, TokenStats]:
        """The sum of `loss_fn` over the batch's trajectories, in a single pass over the head (see
        `fused_linear_trajectory_loss`), and the statistics of its actions, entropy included, without gradient."""
        loss_and_stats: tuple[Tensor, TokenStats] = self(batch, loss_fn)
        return loss_and_stats

    def _head(
        self,
        hidden: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        loss_fn: TrajectoryLossFn | None,
        entropy: bool,
        together: VocabParallelPass | None = None,
    ) -> TokenStats | tuple[Tensor, TokenStats]:
        """What the head says of the targets: all of it, or the group of processes `together`."""
        head = self.lm.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if together is None:
            weight = adapted_weight(head, weight)
        else:
            weight = adapted_weight(head, together.rows(weight), together.entries)
            bias = None if bias is None else together.rows(bias)
        inputs: dict[str, Any] = {
            "hidden": hidden,
            "weight": weight,
            "targets": targets,
            "bias": bias,
            "temperature": self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "tp_group": None if together is None else together.group,
        }
        if loss_fn is None:
            return linear_token_stats(**inputs, entropy=entropy)
        return fused_linear_trajectory_loss(**inputs, cu_seqlens=cu_seqlens, loss_fn=loss_fn, entropy=True)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the model's products; statistics and weights stay float32."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            yield

    def checkpoint_activations(self) -> None:
        """From now on the backward pass computes the activations of each block again, from the block's input."""
        wrapped = {block: checkpoint_wrapper(block) for block in self.blocks}
        for parent in list(self.lm.modules()):
            for name, child in parent.named_children():
                if child in wrapped:
                    setattr(parent, name, wrapped[child])
        self.blocks = list(wrapped.values())

    def own_logits(self, tokens: Tensor) -> Tensor:
        """[T, V]: what the model itself says of one sequence [T], the same on all processes. Sharded as in `forward`."""
        self.lm.set_attn_implementation(self.plain_attention)
        try:
            with self.autocast():
                if self.vocabulary is None:
                    logits: Tensor = self.lm(input_ids=tokens[None], use_cache=False).logits[0]
                    return logits
                batch = self.layout.pack([Trajectory(tokens.tolist(), [0], reward=0.0)]).to(self.device)
                together = VocabParallelPass(self.vocabulary, batch)
                with together.logits_of_all(self.lm):
                    logits = self.lm(inputs_embeds=together.embed()[None], use_cache=False).logits[0]
                return logits
        finally:
            self.lm.set_attn_implementation(self.attention)


def _logit_scale(config: object) -> float:
    """What the model multiplies its logits by: Cohere says `logit_scale`, Granite divides by `logits_scaling`."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
