"""`tbrm plan`: how much memory a recipe will take in each process, and what to change where it does not fit."""

from tbrm import needs_train  # noqa: F401
from tbrm.plan.make import make_plan
from tbrm.plan.terms import PHASES, Plan, Term, peaks

__all__ = ["PHASES", "Plan", "Term", "make_plan", "peaks"]
