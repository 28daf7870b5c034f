"""What a trajectory is, packed and on disk."""
