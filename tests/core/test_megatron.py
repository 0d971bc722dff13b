"""megatron.core as loaded for a CPU: what is rewritten, what is left alone, and what is mended."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_core import megatron

REWRITES = {
    "torch.cuda.synchronize()": "_accelerator.synchronize()",
    "f(device='cuda')": "f(device='cpu')",
    "f('cuda:0')": "f('cpu:0')",
    "x.cuda()": "_to_accelerator(x)",
    "x.cuda(non_blocking=True)": "_to_accelerator(x, non_blocking=True)",
    "x.is_cuda": "_on_accelerator(x)",
    "x.type() == 'torch.cuda.HalfTensor'": "x.type() == 'torch.HalfTensor'",
    "x.pin_memory()": "x",
    "f(pin_memory=True)": "f(pin_memory=False)",
    "from torch.cuda import _lazy_call, device as d": "_lazy_call = _accelerator._lazy_call\nd = _accelerator.device",
    "f'{x} on cuda'": "f'{x} on cuda'",
    "'the cuda path'": "'the cuda path'",
    "self.cuda_graph": "self.cuda_graph",
}


@pytest.mark.parametrize("source", REWRITES)
def test_only_the_device_is_rewritten(source: str):
    tree = ast.fix_missing_locations(megatron._Port("cpu").visit(ast.parse(source)))
    assert ast.unparse(tree) == ast.unparse(ast.parse(REWRITES[source]))


def test_on_an_npu_the_same_names_mean_torch_npu():
    tree = megatron._Port("npu").visit(
        ast.parse("f(torch.cuda.Stream(), 'cuda', 'torch.cuda.FloatTensor', x.pin_memory())")
    )
    expected = "f(_accelerator.Stream(), 'npu', 'torch.npu.FloatTensor', x.pin_memory())"
    assert ast.unparse(ast.fix_missing_locations(tree)) == expected


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


def test_torch_itself_stays_as_it_is(tmp_path: Path):
    code = """
import torch
before = torch.cuda.synchronize, torch.Tensor.cuda
from mindspeed_core import megatron
from mindspeed_core.device import Device
megatron.load(Device.open("cpu"))
megatron.load(Device.open("cpu"))
from megatron.core.tensor_parallel import random
assert (torch.cuda.synchronize, torch.Tensor.cuda) == before
assert random.torch is torch
import megatron.core.optimizer as optimizer, megatron.core.jit as jit
from mindspeed_core.optim.adamw import AdamW
from mindspeed_core.optim.scaling import scale
assert optimizer.Adam is AdamW and jit.jit_fuser(len) is len
assert optimizer.clip_grads.multi_tensor_scale_impl is optimizer.optimizer.multi_tensor_scale_impl is scale
print(random.__file__)
"""
    cold, warm = (_python(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert cold.returncode == 0, cold.stderr
    assert (warm.stdout, warm.stderr) == (cold.stdout, "")
    assert list(tmp_path.glob("mindspeed/megatron/*.bin"))


def test_code_says_the_file_it_is_of_also_where_another_copy_was_rewritten_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [tmp_path / folder / "module.py" for folder in ("one", "other")]
    for file in (*files, *files):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x = 'cuda'\n")
        code = megatron._Loader("module", str(file), "cpu", {}).get_code("module")
        assert code.co_filename == str(file)


def test_a_home_that_cannot_be_written_to_is_only_slower(tmp_path: Path):
    (tmp_path / "file").touch()
    code = (
        "from mindspeed_core import megatron\nfrom mindspeed_core.device import Device\n"
        "megatron.load(Device.open('cpu'))\nimport megatron.core.utils"
    )
    ran = _python(code, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert ran.returncode == 0, ran.stderr


def test_importing_megatron_first_is_our_fault_and_said_so():
    ran = _python(
        "import megatron.core\nfrom mindspeed_core import megatron\nfrom mindspeed_core.device import Device\n"
        "megatron.load(Device.open('cpu'))"
    )
    assert "megatron.core was imported before" in ran.stderr


def test_every_mend_is_still_needed():
    """Upstream as installed: when a row's premise is gone, this fails and the row goes."""
    code = """
import warnings; warnings.simplefilter("ignore")
import megatron.core.jit as jit, megatron.core.optimizer as o, megatron.core.optimizer.distrib_optimizer as d
import torch
assert jit.jit_fuser is torch.compile
assert o.USING_PYTORCH_OPTIMIZER and o.Adam is torch.optim.AdamW
assert not d.HAVE_APEX_OR_TE and not d.USING_APEX_OPTIMIZER
class Counted(torch.Tensor):
    products = 0
    def __mul__(self, factor):
        Counted.products += 1
        return super().__mul__(factor)
t = torch.ones(3).as_subclass(Counted)
o.clip_grads.multi_tensor_scale_impl(0, None, [[t], [t]], 1.0)
assert Counted.products == 1
"""
    ran = _python(code)
    assert ran.returncode == 0, ran.stderr
