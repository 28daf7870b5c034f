"""From what a launcher started to processes that end together."""
