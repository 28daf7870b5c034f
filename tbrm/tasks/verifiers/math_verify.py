"""Right if math-verify (https://github.com/huggingface/Math-Verify) finds the two mathematically equal."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache

from pydantic import Field, model_validator

from tbrm.tasks.answers import boxed, final_answer
from tbrm.tasks.notation import plain_characters, plain_latex
from tbrm.tasks.task import Grade, Problem
from tbrm.tasks.verifiers.text import AnswerVerifier
from tbrm.tasks.workers import Outcome, Workers

_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ -][A-Za-z]+)+")
_BY_ZERO = re.compile(r"\\frac\s*\{[^{}]*\}\s*\{\s*0+\s*\}|/\s*0+(?![0-9.])")


class MathVerify(AnswerVerifier):
    """Compares mathematics, LaTeX or plain, in processes that are killed when a response takes them too long.

    math-verify's own time limits use signal.alarm, which works in main threads only and cannot stop a single long
    operation; they are switched off.
    """

    timeout_seconds: float = Field(5.0, gt=0, description="A response that takes longer gets reward 0 and is counted.")
    processes: int = Field(2, ge=1, description="How many responses are graded at once.")
    memory_gib: float = Field(2.0, gt=0, description="Memory that each process may use.")

    @model_validator(mode="after")
    def _check(self) -> MathVerify:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("verifier math_verify needs the package math-verify: pip install 'tbrm[math]'")
        return self

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        how = (self.answer, self.thinking)
        pairs = [(list(each.answers), text, *how) for each, text in zip(problems, responses, strict=True)]
        workers = _workers(self.processes, int(self.memory_gib * 2**30))
        return [_grade(outcome) for outcome in workers.map("equal", pairs, seconds=self.timeout_seconds)]

    def check_answer(self, answer: str) -> None:
        """What can be seen without math-verify, which takes its time; what it cannot read is a failure when it is graded."""
        if final_answer(plain_characters(answer), "boxed_or_last") is None:
            raise ValueError(f"verifier math_verify: the answer {answer!r:.100} is empty, or its box is never closed")
        inner = boxed(answer) or answer
        if _WORDS.fullmatch(inner.strip()):
            raise ValueError(
                f"verifier math_verify: the answer {answer!r:.100} is words and no mathematics: write "
                f"\\text{{{inner.strip()}}} if words are the answer, or take the verifier exact"
            )
        if _BY_ZERO.search(plain_latex(inner)):
            raise ValueError(f"verifier math_verify: the answer {answer!r:.100} divides by zero")


def _grade(outcome: Outcome) -> Grade:
    if outcome.failure is not None:
        return Grade(0.0, correct=False, failure=f"math_verify: {outcome.failure}")
    return Grade(float(outcome.value), correct=outcome.value)


@cache
def _workers(processes: int, memory_bytes: int) -> Workers:
    """The grading processes, shared by all verifiers with the same settings."""
    return Workers("tbrm.tasks.verifiers.math_verify_process", processes, memory_bytes)
