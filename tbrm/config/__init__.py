"""What a recipe says: its keys, and how it is read."""
