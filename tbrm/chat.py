"""Between text and token ids: a problem becomes a prompt through the chat template, a response becomes text for grading."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from tbrm.tasks import Problem
from tbrm.tasks.base import Message


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The prompt's token ids: through the chat template, or, for a model without one, the plain text."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n".join(message["content"] for message in messages)).input_ids)
    day = getattr(tokenizer, "chat_day", None)
    # What transformers offers to templates by this name reads the clock.
    clock = {"strftime_now": day.strftime} if day and "strftime_now" in str(tokenizer.chat_template) else {}
    ids: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False, **clock)
    return list(ids)


def set_day(tokenizer: Any, day: date) -> None:
    """From now on templates that name the day (Llama 3.2, Mistral, gpt-oss) name this one, or a run's prompts would change at
    midnight. It goes with the tokenizer and its copies: `load_policy` sets the day of loading, and the trainer that on which
    its run began, which checkpoints keep."""
    tokenizer.chat_day = day


def encode_problems(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[list[int]]:
    return [encode_messages(tokenizer, problem.messages) for problem in problems]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))
