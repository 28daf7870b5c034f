"""Names and paths of files, and how a run writes and deletes them."""
