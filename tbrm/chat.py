"""Between text and token ids: a problem becomes a prompt through the chat template, a response becomes text for grading."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tbrm.config.model import ChatConfig
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.policy.ends import Ends, find_ends
from tbrm.policy.positions import positions_of
from tbrm.storage.paths import expand
from tbrm.tasks import Problem
from tbrm.tasks.messages import Message, Tool


@dataclass(frozen=True)
class Chat:
    """How one model is spoken to."""

    tokenizer: PreTrainedTokenizerBase
    ends: Ends
    vocabulary: int
    """Rows of the model's embedding; there may be more of them than tokens of the tokenizer."""
    positions: int | None = None
    """Tokens of prompt and response together, at most; None: no limit."""
    max_new_tokens: int = 0
    """That a prompt must leave room for."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    barred: Sequence[int] = ()
    """Token ids that are never sampled."""
    max_prompt_tokens: int = 0
    """0: no limit."""
    drops_long: bool = False
    said: str = ""
    """What was chosen, in a line."""
    _checked: set[Any] = field(default_factory=set, repr=False, compare=False)
    """Shapes of prompts that the template was seen to show all of."""

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The prompt's token ids: through the chat template, or the plain text. Raises ValueError where that cannot show what
        is given."""
        check_token_ids("model.name: the prompt", ids := self._encode(messages, tools), self.vocabulary)
        return ids

    def encode_problems(self, problems: Sequence[Problem]) -> tuple[list[Problem], list[list[int]]]:
        """The problems whose prompts are no longer than `rollout.max_prompt_tokens`, and these prompts. Raises ValueError for
        a longer one, unless those are dropped, and for one that leaves the model no room for a response."""
        kept: list[Problem] = []
        prompts: list[list[int]] = []
        for problem in problems:
            ids = self.encode(problem.messages, problem.tools)
            if not self.max_prompt_tokens or len(ids) <= self.max_prompt_tokens:
                self.check_length("rollout.max_new_tokens", ids, self.max_new_tokens)
                kept.append(problem)
                prompts.append(ids)
            elif not self.drops_long:
                raise ValueError(
                    f"rollout.max_prompt_tokens: {self.max_prompt_tokens}, and a prompt has {len(ids)} tokens: "
                    f"{problem.messages[-1]['content']!r:.80}. Raise it, or set rollout.long_prompts to drop"
                )
        return kept, prompts

    def check_length(self, where: str, prompt_ids: Sequence[int], response: int) -> None:
        """Raises ValueError where prompt and response have more tokens than the model has positions."""
        if self.positions is not None and len(prompt_ids) + response > self.positions:
            shown = self.tokenizer.decode(list(prompt_ids))
            raise ValueError(
                f"{where}: {response} tokens after a prompt of {len(prompt_ids)} are more than the model's {self.positions} "
                f"positions (max_position_embeddings); shorten either. The prompt: {shown!r:.80}"
            )

    def encode_response(self, text: str, *, truncated: bool) -> list[int]:
        """As the model would have written it, with the end of its turn, unless it was cut off or has an end."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids if truncated or self.ends.length(ids) == len(ids) else [*ids, self.ends.turn]

    def decode(self, token_ids: Sequence[int]) -> str:
        """A response's text: without the token that ended it, and with all other special tokens, for tags may be such."""
        ids = list(token_ids)
        if ids and ids[-1] in self.ends.ids:
            del ids[-1]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _encode(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        ids = self._render(messages, tools)
        shape = (bool(tools), *map(_shape, messages))
        if shape not in self._checked:
            self._check_shown(ids, messages, tools)
            self._checked.add(shape)
        return ids

    def _check_shown(self, ids: list[int], messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Raises ValueError where the template makes the same of another prompt."""
        none = "plain text cannot show it"
        unshown = none if self.tokenizer.chat_template is None else "the model's chat template does not show it"
        for given, *other in _others(messages, tools):
            if not self._differs(ids, *other):
                raise ValueError(f"{given}, and {unshown}; leave it out")

    def _differs(self, ids: list[int], messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
        """Whether the template makes something else of these, if anything."""
        try:
            return ids != self._render(messages, tools)
        except ValueError:
            return True

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer("\n\n".join(message["content"] for message in messages)).input_ids)
        continued = messages[-1]["role"] == "assistant"
        if continued and messages[-1].get("tool_calls"):
            raise ValueError(
                "prompt: it ends with a call of a tool, which cannot be continued; the tool's answer is missing"
            )
        day = getattr(self.tokenizer, "chat_day", None)
        # What transformers offers to templates by this name reads the clock.
        clock = {"strftime_now": day.strftime} if day and "strftime_now" in str(self.tokenizer.chat_template) else {}
        try:
            ids: Any = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                return_dict=False,
                **clock,
                **self.template_kwargs,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"prompt: the model's chat template refuses messages of {roles}: {error}. Where it knows no system role, leave "
                "task.system out"
            ) from error
        return list(ids)


def _shape(message: Message) -> tuple[Any, ...]:
    """What says which parts of a message a template shows."""
    parts = (message["content"].strip(), message.get("tool_calls"), message.get("name"))
    return (message["role"], *map(bool, parts))


def _others(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[tuple[str, list[Message], Sequence[Tool]]]:
    """Each thing that is given, and the prompt without it or with another. Ids of calls, the name of a tool that answers
    (the call has it) and the reasoning of earlier turns are not among them: many templates leave them out on purpose."""
    if tools:
        yield "tools: given", list(messages), ()
    for i, message in enumerate(messages):
        role, content, others = message["role"], message["content"], {}
        if message.get("tool_calls"):
            others["tool_calls: a message has some"] = _without(message, "tool_calls")
        elif content.strip():
            hint = " (task.system)" * (role == "system")
            others[f"messages: one of {role}{hint} says {content!r:.80}"] = {**message, "content": content + " x"}
        if message.get("name") and role != "tool":
            others[f"name: a message of {role} has {message['name']!r:.80}"] = _without(message, "name")
        for given, other in others.items():
            yield given, [*messages[:i], other, *messages[i + 1 :]], tools


def _without(message: Message, field: str) -> Message:
    return {key: part for key, part in message.items() if key != field}


def make_chat(config: Config, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """As the config says. Raises ConfigError."""
    tokenizer = _with_template(tokenizer, config.chat)
    ends, said = find_ends(lm, tokenizer, config.rollout)
    vocabulary = cast(nn.Embedding, lm.get_input_embeddings()).weight.shape[0]
    check_token_ids("rollout.stop_ids", config.rollout.stop_ids, vocabulary)
    kwargs = config.chat.template_kwargs
    ours = {*signature(tokenizer.apply_chat_template).parameters, "messages", "conversations", "strftime_now"}
    for name in kwargs:
        if name in ours:
            raise ConfigError(f"chat.template_kwargs.{name}: not the recipe's to set; leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template or "")):
            raise ConfigError(f"chat.template_kwargs.{name}: the model's chat template has no such name; leave it out")
    barred: list[int] = []
    rollout = config.rollout
    if rollout.bar_unused_ids:
        used = set(tokenizer.get_vocab().values())
        barred = [token for token in range(vocabulary) if token not in used]
        said += f"; {len(barred)} token ids without text are never sampled"
    drops_long = rollout.long_prompts == "drop"
    room = (positions_of(lm.config), rollout.max_new_tokens)
    return Chat(tokenizer, ends, vocabulary, *room, kwargs, barred, rollout.max_prompt_tokens, drops_long, said)


def _with_template(tokenizer: PreTrainedTokenizerBase, config: ChatConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the template that is chosen, which it then keeps, or a copy without one."""
    if config.plain:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = None
    elif config.template:
        tokenizer.chat_template = _template_text(config.template)
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ConfigError(f"chat.template: line {error.lineno}: {error}; wants a Jinja template") from error
        except TemplateError:
            pass  # it may want other messages
    elif tokenizer.chat_template is None:
        raise ConfigError(
            "chat: the model has no chat template: set chat.plain=true to give it plain text, as a base model wants it, or "
            "chat.template to a template's text or file"
        )
    return tokenizer


def _template_text(template: str) -> str:
    if "{" in template:
        return template
    try:
        return Path(expand(template)).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat.template: {template!r} is neither a template's text nor a file of one: {error}"
        ) from error


def check_token_ids(where: str, ids: Sequence[int], vocabulary: int) -> None:
    """Raises ValueError for an id that has no row in an embedding of so many."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{where} holds token id {token}, and the model has embeddings for 0 to {vocabulary - 1}: it is of another "
                "model or tokenizer"
            )
