"""Evaluation on held-out problems: avg@k and pass@k with a confidence interval, and the responses themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean

from tbrm.chat import Chat
from tbrm.parallel import ALONE, World
from tbrm.reporting.progress import Watch, unwatched
from tbrm.rollout.graded import grade_answers
from tbrm.rollout.interface import RolloutEngine, Sampling, make_requests
from tbrm.tasks import Problem, Progress, Task


@dataclass(frozen=True)
class Sample:
    """One graded response to a held-out problem."""

    prompt: str
    response: str
    answer: str
    reward: float
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class Evaluation:
    """How the policy did on held-out problems."""

    accuracy: float
    """avg@k: the share of right responses, averaged over problems."""
    ci_low: float
    ci_high: float
    """95% Wilson interval over problems; for k > 1 it is wider than need be."""
    pass_at_k: float
    """The share of problems with at least one right response among k."""
    k: int
    n: int
    reward_mean: float
    response_length_mean: float
    truncated_share: float
    ungraded: int
    samples: list[Sample]

    def summary(self) -> dict[str, float]:
        """The figures, without the responses."""
        return {key: value for key, value in asdict(self).items() if key != "samples"}


def evaluate(
    engine: RolloutEngine,
    chat: Chat,
    task: Task,
    problems: Sequence[Problem],
    *,
    k: int,
    sampling: Sampling,
    seed: int = 0,
    world: World = ALONE,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> Evaluation:
    """Answers each problem k times and grades the answers, each process of `world` its share; `watch` is told as they come."""
    problems, prompts = chat.encode_problems(problems)
    if not problems:
        raise ValueError("evaluation.prompts: got 0 problems; wants at least 1 (of rollout.max_prompt_tokens, if set)")
    answers = engine.generate(make_requests(prompts, k, "evaluation", seed), sampling, watch)
    graded = grade_answers(task, problems, answers, chat, progress or Progress(), world)
    grades = [each.grade for each in graded]
    right = [sum(grade.correct for grade in grades[i : i + k]) for i in range(0, len(grades), k)]
    accuracy = sum(right) / len(grades)
    ci_low, ci_high = wilson_interval(accuracy, len(problems))
    return Evaluation(
        accuracy=accuracy,
        ci_low=ci_low,
        ci_high=ci_high,
        pass_at_k=fmean(count > 0 for count in right),
        k=k,
        n=len(problems),
        reward_mean=fmean([grade.reward for grade in grades if grade.failure is None] or [0.0]),
        response_length_mean=fmean(len(each.response.token_ids) for each in graded),
        truncated_share=fmean(each.response.truncated for each in graded),
        ungraded=sum(grade.failure is not None for grade in grades),
        samples=[
            Sample(
                prompt=problems[each.number].messages[-1]["content"],
                response=each.text,
                answer=problems[each.number].answer,
                reward=each.grade.reward,
                correct=each.grade.correct,
                truncated=each.response.truncated,
            )
            for each in graded
        ],
    )


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a share observed over n trials (E. B. Wilson, 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
