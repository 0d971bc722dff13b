"""AdamW on tensors that are stored in fewer bits than they are computed in.

                          plain      bf16_states    reuse_fp32_param
    weight and master     2 + 4      2 + 4          2 + 2 (reuse_fp32.py)      bytes per weight
    the two moments       4 + 4      2 + 2          4 + 4

A step takes them a piece at a time: widened to fp32, stepped as always, narrowed again. Masters stay exact; moments are
rounded to bf16 (8 bits) after each step, which a run feels: it is near the run with fp32 moments, not equal to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_core.optim.reuse_fp32 import Rounding, join, split

PIECE = 1 << 18  # elements: three fp32 copies of a piece stay in the cache
MASTER, RESIDUAL, AVERAGE, SQUARE = "fp32_param", "residual", "exp_avg", "exp_avg_sq"

# of lists of weights, gradients and both moments, all fp32, in place
Step = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor]], None]


@dataclass(frozen=True)
class Narrow:
    """How the tensors of an optimizer are stored.

    The second moment is never negative: its sign holds the tie of `reuse_fp32.split`, also where it is zero.
    """

    moments: torch.dtype = torch.float32
    rounding: Rounding | None = None  # of bf16 weights that are their own masters; None: masters are given

    def owns(self, param: Tensor) -> bool:
        """True where the parameter and a residual are its master."""
        return self.rounding is not None and param.dtype == torch.bfloat16

    def state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        state = {name: torch.zeros_like(param, dtype=self.moments) for name in (AVERAGE, SQUARE)}
        if self.owns(param):
            state[RESIDUAL] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def step(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], adam: Step) -> None:
        """Take one step of `adam` on a parameter, its gradient of any dtype and its state, in place."""
        tensors = (param, grad, *state.values())
        for weight, slope, *stored in zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True):
            piece = dict(zip(state, stored, strict=True))
            wide = self._widen(weight, piece)
            adam([wide[MASTER]], [slope.float()], [wide[AVERAGE]], [wide[SQUARE]])
            self._narrow(weight, piece, wide)

    def held(self, param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint holds of a parameter: both moments and, where the parameter is its own, the master.

        The checkpoint is that of a run with separate masters. Some are copies: `hold` takes back what is written there.
        """
        if not self.owns(param):
            return state
        tie, square = state[SQUARE].signbit(), state[SQUARE].abs()
        master = join(param, state[RESIDUAL], tie if self.rounding == "nearest_even" else None)
        return {AVERAGE: state[AVERAGE], SQUARE: square, MASTER: master}

    def hold(self, param: Tensor, state: dict[str, Tensor], held: dict[str, Tensor]) -> None:
        """Store what `held` returned, as it is by now."""
        if self.owns(param):
            flat = {name: tensor.view(-1) for name, tensor in state.items()}
            self._narrow(param.view(-1), flat, {name: tensor.view(-1) for name, tensor in held.items()})

    def _widen(self, weight: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return master and moments in fp32; what is fp32 already, itself."""
        wide = {MASTER: weight, AVERAGE: state[AVERAGE].float(), SQUARE: state[SQUARE].float()}
        if self.owns(weight):
            tie = None
            if self.rounding == "nearest_even":
                tie, wide[SQUARE] = state[SQUARE].signbit(), wide[SQUARE].abs()
            wide[MASTER] = join(weight, state[RESIDUAL], tie)
        return wide

    def _narrow(self, weight: Tensor, state: dict[str, Tensor], wide: dict[str, Tensor]) -> None:
        square = wide[SQUARE]
        if self.owns(weight):
            assert self.rounding is not None
            rounded, residual, tie = split(wide[MASTER], self.rounding)
            weight.copy_(rounded)
            state[RESIDUAL].copy_(residual)
            if tie is not None:
                square = square.where(~tie, -square)
        for name, tensor in ((AVERAGE, wide[AVERAGE]), (SQUARE, square)):
            if tensor is not state[name]:
                state[name].copy_(tensor)
