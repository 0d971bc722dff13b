import pytest


@pytest.fixture(scope="session")
def megatron() -> None:
    """Megatron as the training sees it: whoever imports it first in this process must go through our loader."""
    from mindspeed_core.device import Device
    from mindspeed_core.megatron import load

    load(Device.open("cpu"))
