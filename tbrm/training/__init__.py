"""The loop: steps, what each is worth, what a run can be resumed from."""

from tbrm import needs_train  # noqa: F401
