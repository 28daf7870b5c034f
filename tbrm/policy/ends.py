"""Where a response ends: at a token of its own, or after a text that the recipe names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tbrm.config.rollout import RolloutConfig
from tbrm.config.section import ConfigError

_CONTENT = "abcdef"


@dataclass(frozen=True)
class Ends:
    """What ends a response. Its tokens stay as they were sampled, the one that ends it included."""

    tokenizer: PreTrainedTokenizerBase
    ids: tuple[int, ...]
    turn: int
    """The one of them that ends a response given as text."""
    strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of them, and is not truncated."""

    def length(self, token_ids: Sequence[int]) -> int | None:
        """The number of tokens up to the first end, that included; None if there is no end."""
        found = next((n for n, token in enumerate(token_ids, start=1) if token in self.ids), None)
        if not self.in_text(token_ids[:found]):
            return found
        return 1 + bisect_left(range(1, len(token_ids[:found]) + 1), True, key=lambda n: self.in_text(token_ids[:n]))

    def in_text(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens' text holds one of the strings."""
        if not self.strings:
            return False
        text = self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)

    @property
    def reach(self) -> int:
        """Tokens that a string may be spread over, and one before it: a token is a byte at least."""
        return 1 + max((len(string.encode()) for string in self.strings), default=0)


def find_ends(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> tuple[Ends, str]:
    """Every end that the model, its tokenizer, its chat template and the recipe name; and a line that says so. Raises
    ConfigError if there is none."""
    generation = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    turn = end_of_turn(tokenizer)
    named = {
        "generation_config": [generation] if isinstance(generation, int) else list(generation or []),
        "tokenizer": [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        "chat template": [] if turn is None else [turn],
        "rollout.stop_ids": config.stop_ids,
    }
    sources: dict[int, list[str]] = {}
    for source, ids in named.items():
        for token in ids:
            sources.setdefault(token, []).append(source)
    if not sources:
        raise ConfigError(
            "rollout.stop_ids: none, and the model names no end-of-sequence token, in generation_config, tokenizer or chat "
            "template; give the ids that end a response"
        )
    if turn is None:
        turn = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(sources))
    ends = Ends(tokenizer, tuple(sources), turn, tuple(config.stop_strings))
    said = [f"{_shown(tokenizer, token)} ({', '.join(where)})" for token, where in sources.items()]
    said += [f"the text {string!r}" for string in ends.strings]
    return ends, f"responses end at {', '.join(said)}; one given as text is ended with {_shown(tokenizer, turn)}"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn; None if there is no template, or it has none."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:  # it takes no such conversation; prompts will say why
        return None
    tail: list[int] = tokenizer(text.rpartition(_CONTENT)[2], add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in tail if token in special), None)


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return f"{tokenizer.decode([token])!r} = {token}"
