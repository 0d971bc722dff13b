"""AdamW for Megatron's optimizers: torch's fused kernel, with the state layout that resharding needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mindspeed_core.optim.bf16 import AVERAGE, SQUARE, Narrow


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) whose step count stands in the param group.

    torch's own AdamW keeps a `step` tensor per parameter. Megatron's distributed optimizer cuts per-parameter state into
    shards and reshards it on load, which a scalar cannot be; like apex's FusedAdam, whose contract this follows, each
    parameter's state is `exp_avg` and `exp_avg_sq` alone. The numbers are those of `torch.optim.AdamW`. `narrow` says
    how its tensors are stored; set it before the first step.
    """

    narrow = Narrow()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("L2 regularisation (Adam without W) is not offered; use decoupled weight decay")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients at hand; parameters without one are left alone."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if _gradient(p) is not None]
            if not params:
                continue
            states = [self.init_state(p) for p in params]
            adam = _kernel(group, params[0].device)
            if self.narrow != Narrow():
                for param, state in zip(params, states, strict=True):
                    self.narrow.step(param, _gradient(param), state, adam)
            else:
                adam(
                    params, [p.grad for p in params], *([state[name] for state in states] for name in (AVERAGE, SQUARE))
                )

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter, made before its first step."""
        state = self.state[param]
        if not state:
            state.update(self.narrow.state(param))
        return state

    def held(self, param: Tensor) -> dict[str, Tensor]:
        """Return what a checkpoint holds of a parameter's state: see `Narrow.held`."""
        return self.narrow.held(param, self.init_state(param))

    @torch.no_grad()
    def hold(self, param: Tensor, held: dict[str, Tensor]) -> None:
        """Store what `held` returned, with the values that a checkpoint has put there."""
        self.narrow.hold(param, self.init_state(param), held)


def _gradient(param: Any) -> Any:
    """Return the gradient of a parameter; Megatron calls one whose dtype is not the parameter's decoupled."""
    decoupled = getattr(param, "decoupled_grad", None)
    return param.grad if decoupled is None else decoupled


def _kernel(group: dict[str, Any], device: torch.device) -> Callable[..., None]:
    """Return torch's fused kernel over lists of weights, gradients and both moments, for this step of a param group."""
    beta1, beta2 = group["betas"]
    # the kernel reads the number of the step being taken, one tensor per parameter, and does not change it
    step = torch.tensor(float(group["step"]), device=device)

    def adam(params: list[Tensor], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor]) -> None:
        torch._fused_adamw_(
            params,
            grads,
            averages,
            squares,
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    return adam
