"""Arguments that do not fit stop with a message that names the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tbrm_kernels import linear_token_stats


def arguments(**changed: Any) -> dict[str, Any]:
    return {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2), "targets": torch.tensor([0, 4, -100])} | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 2)}, ValueError, r"hidden has shape \[1, 3, 2\].*flatten"),
        ({"hidden": torch.zeros(3, 0)}, ValueError, r"hidden has shape \[3, 0\]"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight has shape \[5, 3\].*D = 2"),
        ({"weight": torch.zeros(0, 2)}, ValueError, r"weight has shape \[0, 2\].*V > 0"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"targets has shape \[4\].*T = 3"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, TypeError, "targets is torch.int32"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, r"targets\[1\] is 5: .*\[0, 5\)"),
        ({"targets": torch.tensor([0, 1, -1])}, ValueError, r"targets\[2\] is -1: .*ignore_index \(-100\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\].*V = 5"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, TypeError, "bias is torch.int64"),
        ({"hidden": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        (
            {"weight": torch.zeros(5, 2, dtype=torch.bfloat16)},
            TypeError,
            "hidden is torch.float32 and weight torch.b",
        ),
        ({"weight": torch.zeros(5, 2, device="meta")}, ValueError, "weight is on meta and hidden on cpu"),
        ({"temperature": 0.0}, ValueError, r"temperature is 0\.0.*above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \[2\].*a number or \[T = 3\]"),
        ({"temperature": torch.tensor(1.0)}, ValueError, r"temperature has shape \[\].*a number or \[T = 3\]"),
        ({"temperature": torch.ones(3, dtype=torch.int64)}, TypeError, "temperature is torch.int64"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, r"temperature\[1\] is 0\.0: .*above 0"),
        ({"temperature": torch.tensor([1.0, 1.0, torch.nan])}, ValueError, r"temperature\[2\] is nan: .*finite"),
        ({"temperature": torch.ones(3, requires_grad=True)}, ValueError, r"temperature requires grad.*\.detach\(\)"),
        ({"softcap": -1.0}, ValueError, r"softcap is -1\.0.*None"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale is inf"),
        ({"targets": [0, 4, 1]}, TypeError, "targets is a list: pass a torch.Tensor"),
        ({"weight": torch.nn.Linear(2, 5)}, TypeError, r"weight is a Linear: pass its weight, weight\.weight"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn': it must be one of auto, .*torch"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_token_stats(**arguments(**changed))


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_dtensor_is_refused_by_name() -> None:
    weight = DTensor.from_local(torch.zeros(5, 2), init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"weight is a DTensor: .*weight\.full_tensor\(\)"):
        linear_token_stats(**arguments(weight=weight))
    linear_token_stats(**arguments(weight=weight.full_tensor()))
