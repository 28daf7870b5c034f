"""A model that is an object: of Python code's own, where a recipe has the name of files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tbrm.config.model import ModelConfig
from tbrm.config.section import ConfigError
from tbrm.registry import GIVEN


def check_given(config: ModelConfig, lm: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ConfigError unless the config and what was given are one model, and its tokenizer."""
    if lm is None:
        if config.name != GIVEN and tokenizer is not None:
            raise ConfigError("tokenizer: given without a model; that of model.name comes with it: leave it out")
        config.refuse_given()
        return
    if config.name != GIVEN:
        raise ConfigError(
            f"model.name: {config.name!r}, and a model was given, too: set model.name to given, or leave the model out"
        )
    if not isinstance(lm, PreTrainedModel):
        raise ConfigError(
            f"model: got a {type(lm).__name__}; wants a transformers PreTrainedModel, a causal language model"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"tokenizer: got {tokenizer!r:.100} beside a model; wants its transformers tokenizer")
    if any(parameter.is_meta for parameter in lm.parameters()):
        raise ConfigError("model: its weights are on the meta device, which holds none: give it weights first")


@contextmanager
def lent(lm: PreTrainedModel | None) -> Iterator[None]:
    """Within it the model is trained, in place; afterwards it has its own attention again."""
    if lm is None:
        yield
        return
    attention, training = lm.config._attn_implementation, lm.training
    try:
        yield
    finally:
        lm.set_attn_implementation(attention)
        lm.train(training)
