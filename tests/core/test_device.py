"""Finding a device, and taking it."""

import pytest
import torch

from mindspeed_core.device import Device
from mindspeed_core.errors import InputError


def test_a_device_that_is_found_is_not_taken_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    found = Device.find("cuda")
    assert (found.type, found.index, found.count(), taken) == ("cuda", 3, 4, [])
    assert Device.open("cuda") == found
    assert taken == [3]


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no cuda on this machine"):
        Device.find("cuda")
    with pytest.raises(InputError, match="device=tpu: no such device; use auto, npu, cuda, cpu"):
        Device.find("tpu")
