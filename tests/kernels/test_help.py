"""What `help` says of the public functions."""

from __future__ import annotations

import inspect
import re

import pytest

import tbrm_kernels

FUNCTIONS = [name for name in tbrm_kernels.__all__ if inspect.isfunction(getattr(tbrm_kernels, name))]


def test_there_are_functions() -> None:
    assert {"backends", "fused_linear_tbrm_loss", "linear_token_stats", "segment_sums"} < set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_argument_is_explained_where_it_stands(name: str) -> None:
    function = getattr(tbrm_kernels, name)
    text = inspect.getdoc(function) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == list(inspect.signature(function).parameters)
    assert "Returns:\n" in text
