"""Conversations as data sets hold them: OpenAI's form, with calls of tools and what they answered."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
"""`role` and `content`; and what else a chat template may want: `tool_calls`, `tool_call_id`, `name`, ..."""
Tool = dict[str, Any]
"""A JSON schema, as templates take it: {"type": "function", "function": {"name": ...}}."""


def read_messages(where: str, value: Any) -> tuple[Message, ...]:
    """The messages of a row. A column of Parquet has each key in every message: those that are null are left out, and so is
    an empty list of calls, for some templates show such a message as a call. No content is empty content, which no template
    shows as "None". Raises ValueError, with `where` it was."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f'{where} holds {value!r:.100}, and a prompt is text or a list of messages {{"role": "user", "content": "..."}}'
        )
    return tuple(_read_message(where, each) for each in value)


def _read_message(where: str, value: Any) -> Message:
    if isinstance(value, dict) and isinstance(value.get("role"), str):
        message = {key: part for key, part in value.items() if part is not None and (key, part) != ("tool_calls", [])}
        if message.get("tool_calls"):
            message.setdefault("content", "")
        if isinstance(message.get("content"), str):
            return message
    raise ValueError(
        f'{where} holds {value!r:.100}, and a message is {{"role": "user", "content": "..."}}, where content is text, or null '
        "beside tool_calls"
    )


def read_tools(where: str, value: Any) -> tuple[Tool, ...]:
    """The `tools` of a row, null for none. Raises ValueError."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{where} holds {value!r:.100}, and tools are a list of JSON schemas")
    return tuple(value)
