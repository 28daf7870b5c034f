"""Whether rewards begin above the level of the logits, which some objectives fit to them: else little is learnt, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tbrm.objectives import Objective

_ABOVE = 0.2
"""How far above V(s_1), as a share of it, the mean of R/beta is put by what the warning proposes."""


def level_above(value: float) -> float:
    """Where the mean of R/beta should begin, if V(s_1) is this."""
    return value + _ABOVE * abs(value)


def level_warning(objective: Objective, metrics: Mapping[str, Any]) -> str | None:
    """What a user should know after the first step, from its metrics; None if all is well."""
    if not (objective.wants_reward_above_value and metrics.get("trajectories")) or objective.reward_offset == "auto":
        return None
    reward, value, beta = metrics["reward_mean"], metrics["value_mean"], metrics.get("beta", objective.beta)
    lifted = reward + objective.reward_offset
    if not lifted / beta < value:  # nor where one is not finite
        return None
    wanted = level_above(value)
    offset = _rounded(wanted * beta - reward, math.ceil)
    lower = f", and so would objective.beta={_rounded(lifted / wanted, math.floor):g}" if lifted > 0 else ""
    return (
        f"the mean of R/beta is {lifted / beta:.3g}, below that of V(s_1), {value:.3g}: wrong answers are "
        "pushed down before right ones are pushed up, and little is learnt. "
        f"objective.reward_offset={offset:g} (it is {objective.reward_offset:g}) would lift it to {wanted:.3g} and leave the "
        f"best policy as it is{lower}; auto finds one (docs/objectives.md, choosing beta)"
    )


def _rounded(number: float, towards: Any) -> float:
    """To two digits."""
    if number == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(number))) - 1)
    return float(f"{towards(number / unit) * unit:.2g}")
