"""The policy: a transformers backbone whose head is `linear_token_stats`, so that [tokens, vocabulary] logits never exist."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from tbrm.policy.compiled import compile_around_attention, not_compiled
from tbrm.policy.flash_attention import FLASH_ATTENTION, VARLEN_ATTENTION, Paths
from tbrm.policy.flex_attention import FLEX_ATTENTION, Forest
from tbrm.policy.liger import use_liger_kernels
from tbrm.policy.lora import Adapters, adapted_weight, is_adapter, saved_name
from tbrm.policy.packed_attention import PACKED_ATTENTION, Tree
from tbrm.policy.sharding import Sharding
from tbrm.policy.vocab_parallel import DividedVocabulary, VocabParallelPass
from tbrm.policy.weights import materialise
from tbrm.trajectories.packing import TrajectoryBatch, pack
from tbrm.trajectories.trajectory import Trajectory
from tbrm_kernels import TokenStats, TrajectoryLossFn, fused_linear_trajectory_loss, linear_token_stats

FORMS: dict[str, Callable[..., Any]] = {
    PACKED_ATTENTION: Tree.of,
    FLASH_ATTENTION: Paths.of,
    VARLEN_ATTENTION: Paths.of,
    FLEX_ATTENTION: Forest,
}
"""What each attention wants to be told of a batch's segments."""


class PolicyModel(nn.Module):
    """Token statistics of packed trajectories under any transformers causal language model.

    The logits are what the model itself would compute (its head's bias, logit scale and soft-cap included), divided by
    `temperature`: Q(s, a) of the paper. Only positions that predict an action reach the head.

    attention: the name of one that takes packed batches; see `tbrm.policy.attention_choice`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        temperature: float = 1.0,
        precision: torch.dtype = torch.float32,
        attention: str = PACKED_ATTENTION,
        liger: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        text_config = lm.config.get_text_config()
        if liger:
            use_liger_kernels(lm)
        self.lm = lm.eval()  # dropout would make Q, and with it the residual, noise
        self.temperature = temperature
        self.precision = precision
        self.attention = attention
        self.liger = liger
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
        self._plain_attention = "eager" if getattr(text_config, "attn_logit_softcapping", None) else "sdpa"
        lm.set_attn_implementation(attention)

    @property
    def device(self) -> torch.device:
        return self.lm.device if self.sharding is None else self.sharding.device

    def forward(
        self, batch: TrajectoryBatch, loss_fn: TrajectoryLossFn | None = None, *, entropy: bool = False
    ) -> TokenStats | tuple[Tensor, TokenStats]:
        """Statistics of the batch's A actions, [A] float32 each, in the order of `batch.targets`; given `loss_fn`, what
        `trajectory_loss` returns. The head's weight is a whole tensor in here alone, where the processes have gathered it."""
        with self.autocast():
            if self.vocabulary is None:
                return self._head(self.hidden(batch), batch.targets, batch.cu_seqlens, loss_fn, entropy)
            together = VocabParallelPass(self.vocabulary, batch)
            hidden = together.gather(self.hidden(batch, together.embed()))
            loss_of_mine = together.loss_of_mine(loss_fn) if loss_fn else None
            found = self._head(hidden, together.targets, together.cu_seqlens, loss_of_mine, entropy, together)
            return together.mine(found) if isinstance(found, TokenStats) else (found[0], together.mine(found[1]))

    def trajectory_loss(self, batch: TrajectoryBatch, loss_fn: TrajectoryLossFn) -> tuple[Tensor, TokenStats]:
        """The sum of `loss_fn` over the batch's trajectories, in a single pass over the head (see
        `fused_linear_trajectory_loss`), and the statistics of its actions, entropy included, without gradient."""
        loss_and_stats: tuple[Tensor, TokenStats] = self(batch, loss_fn)
        return loss_and_stats

    def hidden(self, batch: TrajectoryBatch, embedded: Tensor | None = None) -> Tensor:
        """[A, D]: the hidden states that predict the batch's actions."""
        tokens = {"input_ids": batch.input_ids[None]} if embedded is None else {"inputs_embeds": embedded[None]}
        segments = FORMS[self.attention](batch.segments, self.device)
        backbone = self.lm.base_model(
            **tokens, position_ids=batch.position_ids[None], segments=segments, use_cache=False
        )
        hidden: Tensor = backbone.last_hidden_state[0, batch.action_rows]
        return hidden

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

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of last hidden states [..., D], as the model itself computes them, in generation mode."""
        logits: Tensor = self.lm.get_output_embeddings()(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def checkpoint_activations(self) -> None:
        """From now on the backward pass computes the activations of each block again, from the block's input."""
        wrapped = {block: checkpoint_wrapper(block) for block in self.blocks}
        for parent in list(self.lm.modules()):
            for name, child in parent.named_children():
                if child in wrapped:
                    setattr(parent, name, wrapped[child])
        self.blocks = list(wrapped.values())

    def shard(self, sharding: Sharding) -> None:
        """Cuts the weights over the processes; those on the meta device are given memory, and are still to be read."""
        if not self.blocks:
            raise ValueError(
                f"model.name: {type(self.lm).__name__} does not say what its blocks are (_no_split_modules), so it cannot be "
                "sharded; run it in one process, without torchrun"
            )
        on_meta = self.lm.device.type == "meta"
        trained = any(parameter.requires_grad for parameter in self.parameters())
        if sharding.config.vocab_parallel:
            self.vocabulary = DividedVocabulary(self.lm, sharding.weights_mesh)
        divided = set(self.vocabulary.parameters) if self.vocabulary else set()
        sharding.apply(self, self.blocks, trained=trained, divided=divided)
        register_fsdp_forward_method(self, "own_logits")
        if on_meta:
            materialise(self.lm, sharding.weights_device, sharding.device)
        if sharding.precision is not torch.float32:
            self.sum_in_float32()
        self.sharding = sharding

    def sum_in_float32(self) -> None:
        """Keeps the sums over blocks float32 where weights are of lower precision, as they are where autocast makes it."""
        self.lm.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.float())

    def frozen_copy(self) -> PolicyModel:
        """The same model as it is now, sharded as a reference is, that takes no gradient."""
        if self.sharding is None:
            return copy.deepcopy(self).requires_grad_(False)
        with torch.device("meta"):
            lm = type(self.lm)(copy.deepcopy(self.lm.config))
        twin = PolicyModel(
            lm,
            temperature=self.temperature,
            precision=self.precision,
            attention=self.attention,
            liger=self.liger,
            compiled=self.compiled,
        ).requires_grad_(False)
        twin.shard(self.sharding.of_reference())
        twin.load_state_dict(self.state_dict())
        return twin

    @contextmanager
    def generation_mode(self, attention: str | None = None) -> Iterator[PreTrainedModel]:
        """The transformers model with its usual attention, or that of the given name; on every process all of it."""
        self.lm.set_attn_implementation(attention or self._plain_attention)
        try:
            with ExitStack() as stack:
                stack.enter_context(self.autocast())
                stack.enter_context(not_compiled())
                if self.sharding is not None:
                    stack.enter_context(self.sharding.gathered(self))
                if self.vocabulary is not None:
                    stack.enter_context(self.vocabulary.gathered(self.precision, self.device))
                yield self.lm
        finally:
            self.lm.set_attn_implementation(self.attention)

    def own_logits(self, tokens: Tensor) -> Tensor:
        """[T, V]: what the model itself says of one sequence [T], the same on all processes. Sharded as in `forward`."""
        self.lm.set_attn_implementation(self._plain_attention)
        try:
            with self.autocast():
                if self.vocabulary is None:
                    logits: Tensor = self.lm(input_ids=tokens[None], use_cache=False).logits[0]
                    return logits
                batch = pack([Trajectory(tokens.tolist(), [0], reward=0.0)]).to(self.device)
                together = VocabParallelPass(self.vocabulary, batch)
                with together.logits_of_all(self.lm):
                    logits = self.lm(inputs_embeds=together.embed()[None], use_cache=False).logits[0]
                return logits
        finally:
            self.lm.set_attn_implementation(self.attention)

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
        for prompt, response in pairs:
            tokens = torch.tensor([*prompt, *response], device=self.device)
            logits = self.own_logits(tokens)[len(prompt) - 1 : -1].float()
            own.append((logits / self.temperature).log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0])
        if self.sharding is not None:
            self.sharding.reshard(self)
        gap = (packed - torch.cat(own)).abs().max().item()
        low_precision = torch.bfloat16 in (self.precision, self.lm.dtype)
        if not gap <= (0.5 if low_precision else 0.01) / min(1.0, self.temperature):
            raise ValueError(
                f"model.name: {type(self.lm).__name__} is not supported: packed token log-probs differ from the model's own by "
                f"{gap:.3g}. Its head or its attention does something tbrm does not know of (linear attention, a scaled hidden "
                "state, attention sinks); use another model, or report it"
            )

    def weights(self) -> dict[str, nn.Parameter]:
        """Every weight of the transformers model once, by the first of its names: a tied head goes by the embedding's. Buffers
        that are saved (a router's correction bias) are among them, adapters are not."""
        named: dict[int, tuple[str, nn.Parameter]] = {}
        for name, weight in self._state().items():
            if not is_adapter(name):
                named.setdefault(id(weight), (name.replace(".base_layer.", "."), weight))
        return dict(named.values())

    def saved_weights(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: all weights or, where there are adapters, those of the adapters alone, by peft's names."""
        if self.adapters is None:
            return self.weights()
        return {saved_name(name): weight for name, weight in self._state().items() if is_adapter(name)}

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """Those of them that learn."""
        return {name: weight for name, weight in self.saved_weights().items() if weight.requires_grad}

    def _state(self) -> dict[str, nn.Parameter]:
        # Not named_parameters: this has the names without wrappers, and slices where the weights are gathered just now.
        return {name.removeprefix("lm."): weight for name, weight in self.state_dict(keep_vars=True).items()}


def _logit_scale(config: object) -> float:
    """What the model multiplies its logits by: Cohere says `logit_scale`, Granite divides by `logits_scaling`."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
