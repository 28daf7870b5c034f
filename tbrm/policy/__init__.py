"""The model as a run has it."""
