"""Verifiers: what says whether a response to a problem of a file is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tbrm.registry import GIVEN, Registry
from tbrm.spelling import hint
from tbrm.tasks.verifiers.reward_function import RewardFunction
from tbrm.tasks.verifiers.several import ByRow, WeightedSum
from tbrm.tasks.verifiers.verifier import Verifier

VERIFIERS = Registry(
    "verifier",
    {
        "exact": "tbrm.tasks.verifiers.exact:Exact",
        "last_number": "tbrm.tasks.verifiers.last_number:LastNumber",
        "choice": "tbrm.tasks.verifiers.choice:Choice",
        "math_verify": "tbrm.tasks.verifiers.math_verify:MathVerify",
        "format": "tbrm.tasks.verifiers.format:Format",
        "length": "tbrm.tasks.verifiers.length:Length",
        GIVEN: "tbrm.tasks.verifiers.given:GivenVerifier",
    },
)


def make_verifier(name: str, options: dict[str, Any], reward_timeout_seconds: float = 600.0) -> Verifier:
    """The verifier called `name`, or, where `name` is the import path of any other callable, that reward function, which has
    `reward_timeout_seconds`.

    Raises ValueError for an unknown name or option.
    """
    found = VERIFIERS(name)
    if not (isinstance(found, type) and issubclass(found, Verifier)):
        if not callable(found):
            raise ValueError(f"verifier: {name} is {found!r:.100}, and a verifier is a function or a Verifier class")
        if options:
            raise ValueError(f"verifier_options: a reward function takes none, and {name} was given {options}")
        return RewardFunction(name=name, function=found, timeout_seconds=reward_timeout_seconds)
    for option in options:
        if option not in found.model_fields:
            raise ValueError(
                f"verifier_options.{option}: {name} has no such option: {hint(option, found.model_fields)}"
            )
    try:
        return found(**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(['verifier_options', *map(str, first['loc'])])}: {first['msg']}") from error


def make_verifiers(
    names: Sequence[str],
    options: Mapping[str, Any],
    reward_timeout_seconds: float,
    weights: Sequence[float] = (),
    column: str | None = None,
) -> Verifier:
    """The weighted sum of these verifiers, or the one that a row names in `column`. They are known by their names, functions by
    what follows the colon; `options` are by the names as given. Raises ValueError."""
    short = [name.rpartition(":")[2] for name in names]
    if len(set(short)) < len(short) or not names:
        raise ValueError(f"verifier: {list(names)}; wants one or more, each with a name of its own")
    if unknown := options.keys() - set(names):
        raise ValueError(f"verifier_options: {sorted(unknown)} are none of the verifiers {list(names)}")
    if column and weights:
        raise ValueError(
            "weights and verifier_column are both set: a row is graded by one verifier or by the sum of all"
        )
    if weights and len(weights) != len(names):
        raise ValueError(f"weights: {len(weights)} for {len(names)} verifiers")
    members = {
        own: make_verifier(name, options.get(name, {}), reward_timeout_seconds)
        for own, name in zip(short, names, strict=True)
    }
    if column:
        return ByRow(members=members, column=column)
    return WeightedSum(members=members, weights=dict(zip(short, weights or [1.0] * len(names), strict=True)))


__all__ = ["VERIFIERS", "Verifier", "make_verifier", "make_verifiers"]
