"""How long a text a model was made for. Past its last position it computes something, or breaks deep inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

_STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rope whose config states the positions of before the stretch; the others state those of after."""


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens of prompt and response together, at most; None where the config sets no limit."""
    text = config.get_text_config()
    stated: int | None = getattr(text, "max_position_embeddings", None)
    if stated is None:
        return None
    ropes: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    kinds = [
        ropes,
        *(rope for rope in ropes.values() if isinstance(rope, Mapping)),
    ]  # one for each kind of layer, perhaps
    stretched = [
        int((rope.get("original_max_position_embeddings") or stated) * rope["factor"])
        for rope in kinds
        if rope.get("rope_type") in _STRETCHED and rope.get("factor")
    ]
    return max([stated, *stretched])
