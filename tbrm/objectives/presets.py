"""`tbrm` with other values, by the names under which they are known."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tbrm.objectives.tbrm import Tbrm


class Reval(Tbrm):
    """`tbrm` with the value `reference`: ReVal ("Off-Policy Value-Based RL for LLMs", arXiv 2603.23355)."""

    value: Literal["reference"] = Field("reference", description="As its name says; objective.name: tbrm has a choice.")


class Tba(Tbrm):
    """`tbrm` with the value `mean`: "Trajectory Balance with Asynchrony" (arXiv 2503.18929)."""

    value: Literal["mean"] = Field("mean", description="As its name says; objective.name: tbrm has a choice.")


class Optimal(Tbrm):
    """`tbrm` with the value `optimal`: of least variance."""

    value: Literal["optimal"] = Field("optimal", description="As its name says; objective.name: tbrm has a choice.")
