"""AdamW for Megatron's optimizers: torch's fused kernel, with the state layout that resharding needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) whose step count stands in the param group.

    torch's own AdamW keeps a `step` tensor per parameter. Megatron's distributed optimizer cuts per-parameter state into
    shards and reshards it on load, which a scalar cannot be; like apex's FusedAdam, whose contract this follows, each
    parameter's state is `exp_avg` and `exp_avg_sq` alone. The numbers are those of `torch.optim.AdamW`.
    """

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
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.init_state(p) for p in params]
            beta1, beta2 = group["betas"]
            # the kernel reads the number of the step being taken, one tensor per parameter, and does not change it
            step = torch.tensor(float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
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

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the two moments of a parameter, zero before its first step."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
