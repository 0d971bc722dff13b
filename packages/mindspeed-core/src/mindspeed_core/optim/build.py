"""Builds the optimizer of a run from its recipe section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_core.optim.schedule import Schedule
from mindspeed_core.recipe import Section

if TYPE_CHECKING:
    from mindspeed_core.parallel.mesh import Mesh


class OptimConfig(Section):
    """Section `optim`: AdamW, its schedule, and how its state is spread over the ranks."""

    lr: float = Field(1e-4, ge=0)  # the peak, reached after the warm-up
    min_lr: float = Field(0.0, ge=0)  # the end of the schedule
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0, ge=0)  # below 1: a fraction of train.steps, else steps
    weight_decay: float = Field(0.1, ge=0)  # decoupled; norms and biases have none
    clip_grad: float = Field(1.0, ge=0)  # the largest norm of the whole gradient; 0: no clipping
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    distributed: bool = False  # cut masters and moments over the data-parallel ranks
    overlap_grad_reduce: bool = False  # sum gradients over the copies while the last backward goes on
    overlap_param_gather: bool = False  # gather what was updated elsewhere while the next forward goes on
    # Names the recipe format reserves; this version takes each only as it stands.
    reuse_fp32_param: bool = False
    bf16_states: bool = False

    @field_validator("reuse_fp32_param", "bf16_states")
    @classmethod
    def _not_yet(cls, value: bool) -> bool:
        if value:
            raise ValueError("this version cannot do that yet; leave it out")
        return value

    @field_validator("warmup")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value:g} is neither a fraction below 1 nor a whole number of steps")
        return value

    @model_validator(mode="after")
    def _has_something_to_gather(self) -> OptimConfig:
        if self.overlap_param_gather and not self.distributed:
            raise ValueError("overlap_param_gather: only a distributed optimizer gathers; set optim.distributed too")
        return self

    @model_validator(mode="after")
    def _falls(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}; the schedule falls from lr to min_lr")
        return self

    def schedule_over(self, steps: int) -> Schedule:
        """Return the learning rate over a run of `steps` steps."""
        return Schedule(lr=self.lr, min_lr=self.min_lr, shape=self.schedule, warmup=self.warmup, steps=steps)


def build_optimizer(config: OptimConfig, chunks: list[Any], mesh: Mesh, precision: str) -> Any:
    """Return Megatron's optimizer over the wrapped chunks: fp32 masters of bf16 weights, cut over dp where asked.

    Its `step()` returns (made, norm of the gradient before clipping, None).
    """
    import torch
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=precision == "bf16",
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed,
        overlap_param_gather=config.overlap_param_gather,
    )
    return get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False, pg_collection=mesh.groups)


def set_lr(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Give every parameter group this step's rate; groups without decay (norms, biases) keep none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
