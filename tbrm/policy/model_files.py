"""Which tensors of a folder's files make which weight of a model.

Files hold a model as it was published: a mixture's experts one by one, GPT-NeoX's head as `embed_out`. transformers knows how
to rename, fuse and split them for each of its models; its own conversions are applied here, one weight at a time.
A model is read whole or not at all: what the files lack, hold beside it or contradict is an error that names it.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tbrm.policy.weights import StoredTensor, local_part, stored_tensors

_COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Tensors of old files that models compute now."""
_NAMED = 4
"""Of many weights, in a message."""


@dataclass
class _Converted:
    """Tensors of the files that become others on their way into the model."""

    converter: WeightConverter
    first: str
    """The name of the first weight that they become."""
    sources: dict[str, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))
    """By the converter's pattern for them; experts in their order."""

    def shapes(self, lm: PreTrainedModel) -> dict[str, torch.Size]:
        """Of what they become. Raises ValueError where they do not fit together."""
        empty = {key: [torch.empty(s.shape, device="meta") for s in sources] for key, sources in self.sources.items()}
        try:
            return {name: tensor.shape for name, tensor in self._convert(lm, empty).items()}
        except (RuntimeError, ValueError, IndexError) as error:
            names = [source.name for sources in self.sources.values() for source in sources]
            raise ValueError(f"{self.first} cannot be made of {_listed(names)}: {error}") from error

    @torch.no_grad()
    def read_into(self, weight: Tensor, name: str, lm: PreTrainedModel) -> None:
        """Fills one weight that they become; of stacked experts each process reads only those of its slice."""
        local, part = local_part(weight)
        if not local.numel():
            return
        mine = part[0] if self._stacks_experts() else slice(None)
        made = self._convert(lm, {key: [s.read() for s in sources[mine]] for key, sources in self.sources.items()})
        local.copy_(made[name][(slice(None), *part[1:]) if self._stacks_experts() else part])

    def _convert(self, lm: PreTrainedModel, tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, found in tensors.items():
            for tensor in found:
                converter.add_tensor(self.first, pattern, pattern, tensor)  # type: ignore[arg-type]
        made = converter.convert(self.first, model=lm, config=lm.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _stacks_experts(self) -> bool:
        """Whether each row of the one weight that they become is made of one tensor of each pattern."""
        stack, *others = self.converter.operations
        apart = all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in others)
        return isinstance(stack, MergeModulelist) and stack.dim == 0 and apart


_Source = StoredTensor | _Converted


class ModelFiles:
    """The weights of a folder, for the model `lm`, which is on the meta device, and has its own names still.

    ignored: patterns of tensors to read past, as if the files did not hold them. Raises ValueError if the files do not hold
    this model, all of it and nothing else.
    """

    def __init__(self, lm: PreTrainedModel, folder: Path, ignored: Sequence[str] = ()) -> None:
        self._lm = copy.deepcopy(lm)  # for conversions that ask for shapes: `lm` will be wrapped and cut
        self._weights: dict[str, Tensor] = self._lm.state_dict(keep_vars=True)
        self._faults: list[str] = []
        stored = stored_tensors(folder)
        names = [name for name in stored if not any(fnmatchcase(name, pattern) for pattern in ignored)]
        self._sources = self._by_weight(self._assigned([stored[name] for name in sorted(names, key=dot_natural_key)]))
        self._share_among_tied()
        if self._faults:
            model = type(lm).__name__
            raise ValueError(f"its files do not hold the {model} of its config.json: {'; '.join(self._faults)}")

    def read(self, weights: Mapping[str, Tensor]) -> None:
        """Fills weights of the model; of those that are sharded each process reads its slice."""
        for name, weight in weights.items():
            source = self._sources[name]
            if isinstance(source, StoredTensor):
                source.read_into(weight)
            else:
                source.read_into(weight, name, self._lm)

    def _assigned(self, stored: Iterable[StoredTensor]) -> dict[str, _Source]:
        """What each weight is read from, or the first of several that are made together, as from_pretrained finds it."""
        conversions = get_model_conversion_mapping(self._lm)
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        assigned: dict[str, _Source] = {}
        unexpected = []
        for tensor in stored:
            name, pattern = rename_source_key(
                tensor.name, renamings, converters, self._lm.base_model_prefix, self._weights
            )
            if name not in self._weights and tensor.name in self._weights:  # it goes by the model's own name already
                name, pattern = tensor.name, None
            if name not in self._weights:
                unexpected += [] if self._is_expendable(name) else [tensor.name]
                continue
            source = assigned.setdefault(name, _Converted(by_pattern[pattern], name) if pattern else tensor)
            if pattern and isinstance(source, _Converted):
                source.sources[pattern].append(tensor)
            elif source is not tensor:
                self._faults.append(f"{tensor.name} is one more {name}")
        if unexpected:
            self._faults.append(
                f"the model has no place for {_listed(unexpected)} (model.ignore_weights: [PATTERN, ...] reads past them)"
            )
        return assigned

    def _is_expendable(self, name: str) -> bool:
        patterns = (*(self._lm._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED)
        return any(re.search(pattern, name) for pattern in patterns)

    def _by_weight(self, assigned: Mapping[str, _Source]) -> dict[str, _Source]:
        """Every weight's source, whose shape is the weight's."""
        sources: dict[str, _Source] = {}
        for name, source in assigned.items():
            try:
                made = {name: source.shape} if isinstance(source, StoredTensor) else source.shapes(self._lm)
            except ValueError as error:
                self._faults.append(str(error))
                made = {name: self._weights[name].shape}
            for other, shape in made.items():
                sources[other] = source
                if shape != (wanted := self._weights[other].shape):
                    self._faults.append(f"{other} has the shape {list(shape)} there, and {list(wanted)} in the model")
        return sources

    def _share_among_tied(self) -> None:
        """Weights that are one in the model have one source, whichever of their names the files know."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, weight in self._weights.items():
            groups[id(weight)].append(name)
        missing = []
        for names in groups.values():
            held = [name for name in names if name in self._sources]
            if not held:
                missing.append(names[0])
                continue
            for other in held[1:]:
                if not _equal(self._sources[held[0]], self._sources[other]):
                    self._faults.append(
                        f'{other} is another than {held[0]}, to which config.json ties it: set "tie_word_embeddings" to false '
                        f"there, or leave it out with model.ignore_weights: [{other}]"
                    )
            self._sources |= dict.fromkeys(names, self._sources[held[0]])
        if missing:
            self._faults.append(f"{_listed(missing)} missing, of {len(groups)} weights")


def _equal(one: _Source, other: _Source) -> bool:
    if not (isinstance(one, StoredTensor) and isinstance(other, StoredTensor)):
        return False
    a, b = one.read(), other.read()
    return a.dtype == b.dtype and torch.equal(a, b)


def _listed(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
