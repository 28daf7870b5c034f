"""What a trajectory is, packed and on disk."""

from tbrm import needs_train  # noqa: F401
