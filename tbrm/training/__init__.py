"""The loop: steps, what each is worth, what a run can be resumed from."""
