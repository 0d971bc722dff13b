"""Every way in which our kernels call the NPU's operators, through torch_npu's own C++: shapes, gradients, what is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ascend import calls
from tests.ascend.trace import golden, traced

pytestmark = pytest.mark.stubs
# inputs whose gradient goes to their sum, not to autograd
NONE_FOR = {"matmul with a sum": [1], "grouped_matmul with sums": [1, 2, 3]}


@pytest.fixture(scope="module")
def found(libraries: Path) -> dict[str, Any]:
    """What came of each call."""
    return traced("tests.ascend.calls", libraries)


@pytest.mark.parametrize("name", calls.GOOD)
def test_a_call_launches_what_it_should(name: str, found: dict[str, Any]) -> None:
    came = found["good"][name]
    assert (came["forward"], came.get("backward", [])) == golden("calls.txt")[name]


@pytest.mark.parametrize("name", calls.GOOD)
def test_every_input_gets_a_gradient_of_its_shape(name: str, found: dict[str, Any]) -> None:
    shapes, came = calls.GOOD[name][0], found["good"][name]
    inputs = [[list(shape.sizes), shape.dtype] for shape in shapes if shape.grad]
    if name.startswith("block"):
        q, k, v = (sizes for sizes, _ in inputs)
        out, lse, *grads = came["outs"]
        assert out == [[*q[:3], v[3]], "float32"]
        assert lse == [[q[1], q[2], q[0]], "float32"]
        assert grads == [[sizes, "float32"] for sizes in (q, k, v)]
    else:
        if not inputs:
            assert "backward" not in came, "what takes no gradient gives none"
            return
        expected = [None if i in NONE_FOR.get(name, []) else told for i, told in enumerate(inputs)]
        assert came["grads"] == expected


@pytest.mark.parametrize("name", calls.BAD)
def test_what_is_wrong_is_told_before_anything_is_launched(name: str, found: dict[str, Any]) -> None:
    assert "launched" not in found["bad"][name]
    assert found["bad"][name]["error"]
