"""Right if the response chooses the right one of several options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from tbrm.spelling import hint
from tbrm.tasks.answers import final_answer, last_line
from tbrm.tasks.choices import LETTERS, chosen_letter
from tbrm.tasks.notation import word
from tbrm.tasks.task import Grade, Problem
from tbrm.tasks.verifiers.text import AnswerVerifier


class Choice(AnswerVerifier):
    """A response chooses by letter, "(B)", "B) Paris", "the answer is B", or, where the options are known, by an option's text.
    The reference answer is a letter, A to J, or the text of an option."""

    options_column: str | None = Field(
        None, description="Column of the options' texts, in the order of their letters: a list, or {letter: text}."
    )

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        right = [self._right(each, text) for each, text in zip(problems, responses, strict=True)]
        return [Grade(float(correct), correct) for correct in right]

    def check_problem(self, problem: Problem) -> None:
        options = self._options(problem)
        for answer in problem.answers:
            self._letter_of(answer, options)

    def _right(self, problem: Problem, response: str) -> bool:
        options = self._options(problem)
        chosen = self._chosen(self.said(response), options)
        return chosen in [self._letter_of(answer, options) for answer in problem.answers]

    def _chosen(self, text: str, options: dict[str, str]) -> str | None:
        found = final_answer(text, self.answer)
        chosen = found and (_by_text(found, options) or chosen_letter(found))
        if chosen or not found or self.answer != "boxed_or_last":
            return chosen
        return chosen_letter(last_line(text) or "")  # the box is a step's, and chooses nothing

    def _letter_of(self, answer: str, options: dict[str, str]) -> str:
        letter = _by_text(answer, options) or chosen_letter(answer)
        if letter is None or (options and letter not in options):
            known = f"the letters and texts of the options {options}" if options else f"the letters {LETTERS}"
            raise ValueError(f"verifier choice: the answer {answer!r:.100} is none of {known}")
        return letter

    def _options(self, problem: Problem) -> dict[str, str]:
        """By letter; of a problem whose options are not told, none."""
        if self.options_column is None:
            return {}
        if self.options_column not in problem.entry:
            raise ValueError(
                f"verifier choice: no column {self.options_column!r} (options_column): "
                f"{hint(self.options_column, problem.entry)}"
            )
        return _as_options(self.options_column, problem.entry[self.options_column])


def _as_options(column: str, cell: Any) -> dict[str, str]:
    if isinstance(cell, list) and 1 < len(cell) <= len(LETTERS):
        return dict(zip(LETTERS, map(str, cell), strict=False))
    if isinstance(cell, dict) and len(cell) > 1 and all(key in LETTERS for key in cell):
        return {key: str(text) for key, text in cell.items()}
    raise ValueError(
        f"verifier choice: column {column!r} holds {cell!r:.100}, and options are a list of 2 to {len(LETTERS)} texts, or "
        '{"A": text, "B": text}'
    )


def _by_text(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option whose text this is, if it is that of one alone."""
    letters = [letter for letter, text in options.items() if word(text) == word(answer)]
    return letters[0] if len(letters) == 1 else None
