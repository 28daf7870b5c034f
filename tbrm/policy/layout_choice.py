"""Whether a model reads packed rows, or a row for each trajectory, and why."""

from __future__ import annotations

from transformers import PreTrainedModel

from tbrm.config.model import ModelConfig
from tbrm.config.section import ConfigError
from tbrm.policy.architecture import check_architecture
from tbrm.policy.model import PolicyModel
from tbrm.trajectories.rows import LengthClass


def only_rows(lm: PreTrainedModel) -> str | None:
    """Why packed rows cannot be exact, where a few tokens would not show it; None if they may be."""
    config = lm.config.get_text_config()
    if kinds := {"dynamic", "longrope"} & set(_rope_types(config)):
        return f"its rope ({', '.join(sorted(kinds))}) depends on the length of the call"
    if getattr(config, "attention_chunk_size", None):
        return "its attention goes by chunks of the row"
    return None


def length_class(lm: PreTrainedModel) -> LengthClass:
    """Sequences that the model's rope takes alike when they are read in one call."""
    config = lm.config.get_text_config()
    kinds, longest = set(_rope_types(config)), _original_length(config)
    if "dynamic" in kinds:
        return lambda length: length if length > longest else 0
    if "longrope" in kinds:
        return lambda length: int(length > longest)
    return lambda length: 0


def settle_layout(policy: PolicyModel, config: ModelConfig) -> str | None:
    """Proves that the model's layout is exact, or with `model.layout: auto` takes rows where packing is not; what to say of it,
    if anything. Raises ValueError where neither is."""
    try:
        check_architecture(policy)
        return None
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, RuntimeError) as error:
        if config.layout != "auto" or policy.in_rows:
            raise
        if policy.sharding is not None:  # a pass that broke off has left processes in different places
            raise ConfigError(
                f"model.layout: {type(policy.lm).__name__} cannot be packed ({_first_line(error)}): set it to rows"
            ) from error
        policy.take_rows(length_class(policy.lm))
        _check_rows(policy)
        return f"{type(policy.lm).__name__} is read in rows, one trajectory each, since packed {_first_line(error)}"


def _check_rows(policy: PolicyModel) -> None:
    try:
        check_architecture(policy)
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, RuntimeError) as error:
        if str(error).startswith("model.name"):
            raise
        raise ValueError(
            f"model.name: {type(policy.lm).__name__} is not supported: it cannot be read as a causal language model "
            f"({type(error).__name__}: {_first_line(error)}); use another model, or report it"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).partition("packed ")[2] or str(error)
    return text.splitlines()[0].partition(". ")[0] if text else type(error).__name__


def _rope_types(config: object) -> list[str]:
    """Of a config whose rope may be one for all layers, or one for each kind of them."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [one["rope_type"] for one in each if isinstance(one.get("rope_type"), str)]


def _original_length(config: object) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    given = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(given or getattr(config, "max_position_embeddings", None) or 0)
