"""Problems of any reasoning-gym family (https://github.com/open-thought/reasoning-gym), made as they are needed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import Field, model_validator

from tbrm.tasks.answers import Extractor
from tbrm.tasks.task import Grade, Problem, Task
from tbrm.tasks.workers import Workers

# Training and held-out items come from different halves of reasoning-gym's seeds, of which 2^32 are usable (numpy's
# limit). Streams of nearby seeds start this far apart.
_HALF = 2**31
_STRIDE = 1_000_003

_MAKE_SECONDS = 120.0
_MEMORY_BYTES = 4 * 2**30


class ReasoningGym(Task):
    """A reasoning-gym family, graded by the family's own scorer.

    Training problems come from reasoning-gym's seeds below 2^31, held-out ones from those above.

    The scorers' values between 0 and 1 are often artefacts of the text. Where 12 is right, chain_sum's gives "-12"
    0.67, as "12" is in it, and several give 0.01 or 0.05 for anything. So by default a reward is 1 or 0.
    """

    family: str = Field("chain_sum", description="Name of the reasoning-gym family.")
    params: dict[str, Any] = Field({}, description="Parameters of the family, such as {max_terms: 2}.")
    prompt: str = Field(
        "{question}", description="The user's message; {question} or any key of an item's metadata is filled in."
    )
    system: str | None = Field(None, description="System message before the prompt.")
    answer: Extractor = Field("last_number", description="Which part of the response is scored.")
    partial_credit: bool = Field(
        False, description="Reward answers that are not right with the scorer's value below 1."
    )
    heldout_seed: int = Field(0, description="Seed of the held-out problems.")
    timeout_seconds: float = Field(10.0, gt=0, description="Scoring one response may take this long.")

    @model_validator(mode="after")
    def _check(self) -> ReasoningGym:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("name: reasoning_gym needs the package of that name: pip install 'tbrm[train]'")
        try:
            params = self._params
        except TypeError as error:
            raise ValueError(f"params: {error}; use numbers, strings, booleans, lists and mappings") from error
        outcome = _process().call("check", self.family, params, self.prompt, self.answer, seconds=_MAKE_SECONDS)
        if problem := outcome.failure or outcome.value:
            raise ValueError(problem)
        return self

    def problem(self, index: int, seed: int) -> Problem:
        return self._make((seed * _STRIDE + index) % _HALF)

    def heldout(self, count: int) -> list[Problem]:
        distinct: dict[str, Problem] = {}
        index = repeats = 0
        while len(distinct) < count:
            problem = self._make(_HALF + (self.heldout_seed * _STRIDE + index) % _HALF)
            index += 1
            repeats = repeats + 1 if problem.key in distinct else 0
            if repeats > 1000:
                raise ValueError(
                    f"family: {self.family} with params {self.params} gave {len(distinct)} distinct prompts, then 1000 "
                    f"repeats, and evaluation wants {count}: lower evaluation.prompts or widen params"
                )
            distinct.setdefault(problem.key, problem)
        return list(distinct.values())

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [self._grade(problem, response) for problem, response in zip(problems, responses, strict=True)]

    def _grade(self, problem: Problem, response: str) -> Grade:
        position = problem.entry["position"]
        outcome = _process().call(
            "score", self.family, self._params, position, self.answer, response, seconds=self.timeout_seconds
        )
        if outcome.failure is not None:
            return Grade(0.0, correct=False, failure=f"{self.family}'s scorer: {outcome.failure}")
        reward = outcome.value if self.partial_credit else float(outcome.value >= 1 - 1e-6)
        return Grade(reward, self.is_correct(reward))

    def _make(self, position: int) -> Problem:
        outcome = _process().call("make", self.family, self._params, self.prompt, position, seconds=_MAKE_SECONDS)
        if outcome.failure is not None:
            raise ValueError(f"reasoning-gym could not make item {position} of {self.family}: {outcome.failure}")
        text, answer = outcome.value
        entry = {"family": self.family, "position": position}
        if self.system is None:
            return Problem(text, answer, entry)
        return Problem(({"role": "system", "content": self.system}, {"role": "user", "content": text}), answer, entry)

    @property
    def _params(self) -> str:
        return json.dumps(self.params, sort_keys=True)


@cache
def _process() -> Workers:
    """The process in which reasoning-gym lives, one for all tasks of this kind."""
    return Workers("tbrm.tasks.reasoning_gym_process", count=1, memory_bytes=_MEMORY_BYTES)
