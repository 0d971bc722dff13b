"""Shared fixtures. Thread limits are set before torch is first imported."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}.items():
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).resolve().parents[1]
CI = os.environ.get("CI", "").lower() in ("1", "true")
collect_ignore = ["ascend"]  # asked for by name, in an environment of its own: `hatch run ascend:test`
MATERIAL = {"shared_data", "smollm2", "chromium"}  # fixtures that skip where their material is missing


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bf16, made once per user and machine."""
    from tests.smollm2 import UnavailableError, folder

    try:
        return folder()
    except UnavailableError as error:
        pytest.skip(f"no SmolLM2-135M-Instruct: {error}")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on the PATH")
    return path


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Under CI the material must be there: a skip for want of it is a failure."""
    outcome = yield
    report = outcome.get_result()
    needs = MATERIAL & set(getattr(item, "fixturenames", ()))
    marked = any(item.get_closest_marker(name) for name in ("real_data", "browser"))
    if CI and report.skipped and (needs or marked) and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"CI=true allows no skip for want of material: {report.longrepr}"
