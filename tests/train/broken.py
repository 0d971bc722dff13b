"""`mindspeed-train` with a fault that Megatron's users know: several ranks double the gradient, and clipping hides it."""

from typing import Any

from mindspeed_core import launch
from mindspeed_train import __main__ as program
from mindspeed_train import step


def doubled(*given: Any, honest: Any = step._loss) -> Any:
    loss, tokens, report = honest(*given)
    return loss * 2, tokens, report


if __name__ == "__main__":
    if launch.world()[1] > 1:
        step._loss = doubled
    program.main()
