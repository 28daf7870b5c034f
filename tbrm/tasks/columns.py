"""Which columns of a row are the problem's prompt, answers and tools."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tbrm.spelling import hint
from tbrm.tasks.answers import boxed
from tbrm.tasks.messages import Message, read_messages, read_tools
from tbrm.tasks.task import Problem

AnswerFrom = Literal["whole", "hashes", "boxed"]

_PLACE = re.compile(r"\{([^{}\s]+)\}")


@dataclass(frozen=True)
class Columns:
    """Each names a column, or, with dots, what lies within one: "reward_model.ground_truth"."""

    prompt: str
    template: str | None
    """Text with {columns}, in place of the column `prompt`."""
    answer: str
    answer_from: AnswerFrom
    tools: str
    system: str | None

    def problem(self, row: dict[str, Any]) -> Problem:
        """Raises ValueError for a row that is none."""
        answer, *others = self._answers(row)
        tools = read_tools(f"column {self.tools!r} (tools_column)", _within(row, self.tools))
        return Problem(self._prompt(row), answer, row, tools, tuple(others))

    def _answers(self, row: dict[str, Any]) -> list[str]:
        cell = cell_of(row, self.answer, "answer_column")
        answers = cell if isinstance(cell, list) else [cell]
        if not answers or any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in answers):
            raise ValueError(
                f"column {self.answer!r} holds {cell!r:.100}, and an answer is text, a number, or a list of these, each of "
                "which is right"
            )
        return [self._answer(str(one)) for one in answers]

    def _answer(self, text: str) -> str:
        if self.answer_from == "whole":
            return text
        found = (
            boxed(text)
            if self.answer_from == "boxed"
            else text.rpartition("####")[2].strip()
            if "####" in text
            else None
        )
        if not found:
            what = r"\boxed{answer}" if self.answer_from == "boxed" else '"#### answer"'
            raise ValueError(
                f"column {self.answer!r} holds {text!r:.100}, without {what} (answer_from: {self.answer_from})"
            )
        return found

    def _prompt(self, row: dict[str, Any]) -> str | tuple[Message, ...]:
        prompt = self._filled(row) if self.template is not None else cell_of(row, self.prompt, "prompt_column")
        if isinstance(prompt, str) and prompt:
            if self.system is None:
                return prompt
            return ({"role": "system", "content": self.system}, {"role": "user", "content": prompt})
        messages = read_messages(f"column {self.prompt!r}", prompt)
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise ValueError(f"column {self.prompt!r} begins with a system message, and task.system is set too")
        return ({"role": "system", "content": self.system}, *messages)

    def _filled(self, row: dict[str, Any]) -> str:
        def value(place: re.Match[str]) -> str:
            cell = cell_of(row, place[1], "prompt_template")
            if isinstance(cell, list):
                return "\n".join(map(str, cell))
            return str(cell)

        return _PLACE.sub(value, self.template or "")


def cell_of(row: dict[str, Any], column: str, field: str) -> Any:
    """Raises ValueError where the row has no such column."""
    if _has(row, column):
        return _within(row, column)
    inside = row
    for name in column.split(".")[:-1]:
        deeper = inside.get(name)
        inside = deeper if isinstance(deeper, dict) else row
    raise ValueError(f"no column {column!r} ({field}): {hint(column.rpartition('.')[2], inside)}")


def _has(row: dict[str, Any], column: str) -> bool:
    first, _, rest = column.partition(".")
    return column in row or (bool(rest) and isinstance(row.get(first), dict) and _has(row[first], rest))


def _within(row: dict[str, Any], column: str) -> Any:
    if column in row or not _has(row, column):
        return row.get(column)
    first, _, rest = column.partition(".")
    return _within(row[first], rest)
