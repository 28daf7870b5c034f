"""What a recipe says: its keys, and how it is read."""

from tbrm import needs_train  # noqa: F401
