"""The model as a run has it."""

from tbrm import needs_train  # noqa: F401
