"""Several verifiers: their rewards added up, or one of them for each row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tbrm.spelling import hint
from tbrm.tasks.task import Grade, Problem, Progress
from tbrm.tasks.verifiers.verifier import CompletionVerifier, Verifier


class _Several(CompletionVerifier):
    members: dict[str, Verifier]
    """By the names that they are known by."""

    def require_objects(self) -> None:
        for member in self.members.values():
            member.require_objects()

    def check_columns(self, names: Iterable[str]) -> None:
        for member in self.members.values():
            member.check_columns(names)


class WeightedSum(_Several):
    """The sum of the members' rewards, each times its weight. A member that has no reward to give (None of a reward function, a
    failure) is left out of the sum; if none has one, the response is ungraded. Whether a response is correct the first says."""

    weights: dict[str, float]

    def grade(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]:
        by_member = [member.grade(problems, responses, completion_ids, progress) for member in self.members.values()]
        return [self._sum(grades) for grades in zip(*by_member, strict=True)]

    def _sum(self, grades: tuple[Grade, ...]) -> Grade:
        parts = {name: g.reward for name, g in zip(self.members, grades, strict=True) if g.failure is None}
        if not parts:
            return Grade(0.0, correct=False, failure="; ".join(grade.failure or "" for grade in grades))
        total = sum(self.weights[name] * reward for name, reward in parts.items())
        return Grade(total, correct=grades[0].correct, parts=parts)

    def check_problem(self, problem: Problem) -> None:
        for member in self.members.values():
            member.check_problem(problem)


class ByRow(_Several):
    """The member that a column of the problem's row names."""

    column: str

    def grade(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]:
        found: dict[int, Grade] = {}
        names = [self._name(problem) for problem in problems]
        for name, member in self.members.items():
            own = [i for i, each in enumerate(names) if each == name]
            if not own:
                continue
            ids = [completion_ids[i] for i in own]
            grades = member.grade([problems[i] for i in own], [responses[i] for i in own], ids, progress)
            found |= {
                i: Grade(g.reward, g.correct, g.failure, g.parts or ({name: g.reward} if g.failure is None else {}))
                for i, g in zip(own, grades, strict=True)
            }
        return [found[i] for i in range(len(responses))]

    def check_problem(self, problem: Problem) -> None:
        self.members[self._name(problem)].check_problem(problem)

    def _name(self, problem: Problem) -> str:
        name = problem.entry.get(self.column)
        if name not in self.members:
            raise ValueError(
                f"column {self.column!r} (verifier_column) holds {name!r:.100}, which is none of task.verifier: "
                f"{hint(str(name), self.members)}"
            )
        return str(name)
