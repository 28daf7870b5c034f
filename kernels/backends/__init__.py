"""One module per backend, `interface.py` for what they have in common, `registry.py` for the choice between them."""
