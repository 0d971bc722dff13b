"""The mesh of ranks: how many processes split what, and the only owner of process groups."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch.distributed as dist
from pydantic import Field, model_validator

from mindspeed_core import launch, megatron
from mindspeed_core.device import Device
from mindspeed_core.errors import InputError
from mindspeed_core.parallel.pipeline import Placement, balanced
from mindspeed_core.recipe import Section

if TYPE_CHECKING:
    from mindspeed_core.models.family import Architecture


class ParallelConfig(Section):
    """Section `parallel`: the size of each axis. ranks = tp x pp x cp x dp."""

    tp: int = Field(1, ge=1)  # tensor: every layer is cut over tp ranks
    pp: int = Field(1, ge=1)  # pipeline: the layers are cut into pp stages
    dp: int | None = Field(None, ge=1)  # data: copies of the model; null takes what the ranks leave
    sp: bool = False  # sequence: norms and residuals are cut over the tp ranks too
    collective_matmul: Literal["none", "coc", "mc2"] = "none"  # products and collectives of tp: apart, in pieces, fused
    coc_chunks: Literal[1, 2, 4, 8] = 4  # the pieces of coc
    vpp: int = Field(1, ge=1)  # chunks of layers per stage: a smaller bubble for more messages
    delay_weight_gradients: bool = False  # they are made while the gradient that the stage before waits for travels
    # layers of each stage; balanced: by their work and that of the output layer; null: as equal as can be
    layers_per_stage: tuple[int, ...] | Literal["balanced"] | None = None
    noop_layers: tuple[int, ...] = ()  # places that compute nothing, counted from 0 with the layers
    cp: int = Field(1, ge=1)  # context: every sequence is cut over cp ranks
    # keys go round; heads are dealt; heads are dealt within and keys go round between
    cp_algorithm: Literal["ring", "ulysses", "hybrid"] = "ring"
    ulysses: int = Field(1, ge=1)  # of a hybrid: how many of the cp ranks deal heads; the ring has cp / ulysses places
    cp_window: int = Field(1, ge=1)  # ranks of an inner ring; 1: a single ring
    cp_overlap: bool = False  # a second group, so that sending never waits for receiving
    ep: int = Field(1, ge=1)  # expert: the experts of a layer are dealt to ep ranks; it divides the ranks of a stage
    etp: int | None = Field(None, ge=1)  # tensor parallel degree of one expert: tp (the default), or 1

    @model_validator(mode="after")
    def _agrees(self) -> ParallelConfig:
        problems = []
        if self.etp not in (None, 1, self.tp):
            problems.append(
                f"etp={self.etp}: an expert is cut over all of tp={self.tp} or not at all; use {self.tp} or 1"
            )
        chunks, product = self.coc_chunks, self.collective_matmul
        if product != "coc" and chunks != ParallelConfig.model_fields["coc_chunks"].default:
            problems.append(
                f"coc_chunks: {chunks} is for collective_matmul=coc, not {product}; set collective_matmul, or leave it out"
            )
        if self.layers_per_stage == "balanced" and (self.vpp > 1 or self.noop_layers):
            other = f"vpp={self.vpp}" if self.vpp > 1 else "noop_layers"
            problems.append(
                f"layers_per_stage=balanced: chooses the layers of whole stages, which {other} cuts otherwise; "
                "leave one of them out"
            )
        problems += context_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def ulysses_size(self) -> int:
        """How many ranks deal the heads of a sequence among them."""
        return {"ring": 1, "ulysses": self.cp, "hybrid": self.ulysses}[self.cp_algorithm]

    @property
    def ring_size(self) -> int:
        """How many places the keys of a sequence go round."""
        return self.cp // self.ulysses_size

    @property
    def expert_ranks(self) -> int:
        """How many ranks hold one copy of the experts of a stage."""
        return self.ep * (self.tp if self.etp is None else self.etp)

    @property
    def model_ranks(self) -> int:
        """How many ranks hold one copy of the model."""
        return self.tp * self.pp * self.cp

    def placement(self, arch: Architecture) -> Placement:
        """Return where the layers of a model lie."""
        counts = self.layers_per_stage
        if counts == "balanced":  # more stages than layers are told of as without it
            work = [arch.layer_products(layer) for layer in range(arch.num_layers)]
            counts = balanced(work, arch.head_products, self.pp) if self.pp <= arch.num_layers else None
        return Placement(
            num_layers=arch.num_layers,
            pp=self.pp,
            vpp=self.vpp,
            layers_per_stage=counts,
            noop_layers=tuple(sorted(self.noop_layers)),
        )

    def world_size(self, device_count: int = 1) -> int:
        """Return how many ranks to start: dp as asked, else as many copies as the devices leave room for."""
        if self.dp is not None:
            return self.model_ranks * self.dp
        # copies of the model come in as many as the experts need to be dealt to
        copies = self.expert_ranks // math.gcd(self.expert_ranks, self.tp * self.cp)
        return self.model_ranks * max(copies, device_count // self.model_ranks // copies * copies)

    def check(self, world_size: int) -> None:
        """Raise where `world_size` ranks cannot form this mesh."""
        if world_size % self.model_ranks:
            raise InputError(
                f"parallel: tp={self.tp} x pp={self.pp} x cp={self.cp} = {self.model_ranks} ranks hold one copy of the model, "
                f"which {world_size} ranks cannot be divided into; start a multiple of {self.model_ranks}"
            )
        if self.dp is not None and self.dp * self.model_ranks != world_size:
            raise InputError(
                f"parallel.dp={self.dp}: {world_size} ranks make dp={world_size // self.model_ranks}; "
                "leave parallel.dp out, or start tp x pp x cp x dp ranks"
            )
        stage = world_size // self.pp
        places = stage * self.ep // self.expert_ranks
        if places % self.ep or stage % self.expert_ranks:
            what = "tp x cp x dp" if self.etp == 1 else "cp x dp"
            raise InputError(f"parallel.ep={self.ep} does not divide {what}={places}; use a divisor of {places}")


def context_problems(config: ParallelConfig) -> list[str]:
    """Return what is wrong with the keys that cut sequences."""
    cp, algorithm, ulysses, window = config.cp, config.cp_algorithm, config.ulysses, config.cp_window
    problems = []
    if algorithm != "hybrid" and ulysses != 1:
        problems.append(f"ulysses: {ulysses} is for cp_algorithm=hybrid, not {algorithm}; leave it out")
    elif cp == 1 and algorithm != "ring":
        problems.append(f"cp_algorithm: {algorithm} cuts sequences over cp ranks, and cp=1; set cp, or leave it out")
    elif algorithm == "hybrid" and (cp % ulysses or not 1 < ulysses < cp):
        fitting = [str(n) for n in range(2, cp) if cp % n == 0]
        what = (
            f"hybrid needs it: how many of the cp={cp} ranks deal heads, which form a ring of at least 2 groups"
            if ulysses == 1
            else f"{ulysses} does not divide cp={cp} into a ring of at least 2"
        )
        mend = f"use {' or '.join(fitting)}" if fitting else "use cp_algorithm ring or ulysses, or cp=4"
        problems.append(f"ulysses: {what}; {mend}")
    if problems:
        return problems
    if config.ring_size == 1:
        none, mend = ("cp=1", "set cp") if cp == 1 else (f"cp_algorithm={algorithm}", "use ring or hybrid")
        asked = {"cp_window": window > 1, "cp_overlap": config.cp_overlap}
        return [
            f"{name}: is of a ring of at least 2 ranks, and {none} makes none; leave it out, or {mend}"
            for name, wanted in asked.items()
            if wanted
        ]
    if config.ring_size % window:
        fitting = [str(n) for n in range(1, config.ring_size + 1) if config.ring_size % n == 0]
        problems.append(
            f"cp_window: {window} does not divide the ring of {config.ring_size}; use {' or '.join(fitting)}"
        )
    return problems


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it."""

    size: int
    rank: int
    group: dist.ProcessGroup


class Mesh:
    """The axes of the run. Ranks are numbered tp first, then cp, dp, pp: tp neighbours are neighbours on a node.

    tp=2 pp=2 dp=2       dp 0      dp 1
      stage 0          [0, 1]    [2, 3]
      stage 1          [4, 5]    [6, 7]

    The cp ranks of a hybrid form a grid: neighbours deal heads (`ulysses`), those `ulysses` apart form a ring (`ring`).
    """

    def __init__(self, config: ParallelConfig, device: Device, groups: Any, axes: dict[str, Axis], owner: bool) -> None:
        self.config = config
        self.device = device
        self.groups = groups  # megatron's ProcessGroupCollection
        self.tp, self.pp, self.dp, self.cp = (axes[name] for name in ("tp", "pp", "dp", "cp"))
        # the ranks of a stage once more, as the experts see them: etp x ep x edp = tp x cp x dp
        self.etp, self.ep, self.edp = (axes[name] for name in ("etp", "ep", "edp"))
        self.ring, self.ulysses = axes["ring"], axes["ulysses"]  # what cp is made of: cp = ring x ulysses
        self.second_ring = axes["second ring"].group if config.cp_overlap else None
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._owner = owner

    @classmethod
    def create(cls, config: ParallelConfig, device: Device, *, seed: int = 1234, timeout: float = 1800.0) -> Mesh:
        """Join the other ranks and form the groups. Collective: every rank calls it.

        `timeout` is in seconds: a rank that waits longer for its peers gives up with an error.
        """
        megatron.load(device)
        owner = not dist.is_initialized()
        if owner:
            dist.init_process_group(device.backend, timeout=datetime.timedelta(seconds=timeout), **launch.rendezvous())
        config.check(dist.get_world_size())

        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        minutes: Any = timeout / 60  # megatron asks for whole ones, and takes any
        parallel_state.initialize_model_parallel(
            config.tp,
            config.pp,
            config.vpp if config.vpp > 1 else None,
            context_parallel_size=config.cp,
            expert_model_parallel_size=config.ep,
            expert_tensor_parallel_size=config.etp,
            distributed_timeout_minutes=minutes,
            create_gloo_process_groups=False,
        )
        device.seed(seed)
        model_parallel_cuda_manual_seed(seed)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        axes = {
            name: Axis(group.size(), group.rank(), group)
            for name, group in (
                ("tp", groups.tp),
                ("pp", groups.pp),
                ("dp", groups.dp),
                ("cp", groups.cp),
                ("ep", groups.ep),
                ("etp", groups.expt_tp),
                ("edp", groups.expt_dp),
            )
        }
        axes |= _context_axes(config, axes["cp"], timeout)
        return cls(config, device, groups, axes, owner)

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks: rank 0."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding is."""
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the loss is."""
        return self.pp.rank == self.pp.size - 1

    def close(self) -> None:
        """Give the groups back; the process group too when this mesh made it."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        if self._owner and dist.is_initialized():
            dist.destroy_process_group()


def _context_axes(config: ParallelConfig, cp: Axis, timeout: float) -> dict[str, Axis]:
    """Form the axes that cp is made of. Where one of them is all of cp, its group serves."""
    ring, ulysses, limit = config.ring_size, config.ulysses_size, datetime.timedelta(seconds=timeout)
    grid = np.arange(dist.get_world_size()).reshape(-1, ring, ulysses, config.tp)  # ranks, in the order of the mesh

    def axis(size: int, rank: int, dimension: int, *, own: bool = False) -> Axis:
        if size == cp.size and not own:
            return cp
        if size == 1:  # every rank has one of its own, and none waits for the others
            alone: Any = dist.new_group([dist.get_rank()], timeout=limit, use_local_synchronization=True)
            return Axis(1, 0, alone)
        rows = np.moveaxis(grid, dimension, -1).reshape(-1, size).tolist()
        group: Any = dist.new_subgroups_by_enumeration(rows, timeout=limit)[0]
        return Axis(size, rank, group)

    place, part = divmod(cp.rank, ulysses)
    axes = {"ring": axis(ring, place, 1), "ulysses": axis(ulysses, part, 2)}
    if config.cp_overlap:
        axes["second ring"] = axis(ring, place, 1, own=True)
    return axes
