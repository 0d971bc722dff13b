"""The operators of torch_npu that our kernels call have the schemas that they were written for."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from tests.harness import ROOT

KERNELS = ROOT / "packages/mindspeed-core/src/mindspeed_core"
GOLDEN = Path(__file__).parent / "schemas.txt"


def called() -> set[str]:
    """Return the names behind `torch.ops.npu.` in our sources."""
    names = set()
    for file in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops.npu":
                assert file.parent == KERNELS / "kernels", f"{file}: only kernels know the NPU's operators"
                names.add(node.attr)
    return names


def test_every_operator_that_is_called_has_its_schema() -> None:
    written = GOLDEN.read_text().splitlines()
    found = sorted(str(getattr(torch.ops.npu, name).default._schema) for name in called())
    assert found == written, "\n".join(["another release of torch_npu? it says", *found])
