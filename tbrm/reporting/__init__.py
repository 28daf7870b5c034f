"""What a run wrote down, and what is made of it."""

from tbrm import needs_train  # noqa: F401
