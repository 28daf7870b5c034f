"""The hint in an error message about a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: str, known: Iterable[str]) -> str:
    """``did you mean 'min_terms'? Known: max_terms, min_terms``; the question is left out where nothing is near."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    question = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{question}Known: {', '.join(names) or 'none'}"
