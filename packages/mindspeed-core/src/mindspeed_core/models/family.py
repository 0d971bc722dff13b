"""What a model family is: a table from Hugging Face tensors to Megatron tensors, and the architecture behind it.

Hugging Face names are the pivot of the whole toolchain: every checkpoint format presents itself as a mapping from
Hugging Face names to tensors, and a family's rows say how each Megatron tensor is packed from them and cut over the
tensor-parallel ranks. Conversion, training, evaluation and generation read the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from mindspeed_core.errors import InputError

RouterKind = Literal["aux_loss", "softmax_topk", "group_limited_greedy", "noaux_tc", "sinkhorn", "sparsemixer"]
Balance = Literal["micro_batch", "sequence"]
ROUTER = (
    "mindspeed_router"  # key of config.json: the router a model was trained with, where its family has no key for it
)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts that stands in some layers where others have a feed-forward layer."""

    count: int
    top_k: int  # experts that compute one token
    ffn_hidden_size: int  # of one expert
    shared_ffn_hidden_size: int = 0  # of what computes every token beside them; 0: nothing does
    shared_gate: bool = False  # a sigmoid of the token scales what the shared experts say
    # which layers: behind the first `first_dense`, each i with i % every == offset, but for `dense_layers`
    first_dense: int = 0
    every: int = 1
    offset: int = 0
    dense_layers: tuple[int, ...] = ()
    router: RouterKind = "softmax_topk"
    groups: int = 1  # the router first chooses `topk_groups` of so many groups of neighbouring experts
    topk_groups: int = 1
    normalize: bool = False  # the weights of a token's experts are made to sum to one
    scaling: float = 1.0  # what those weights are multiplied with
    bias: bool = False  # an expert's bias in the choice, which follows its load (noaux_tc)
    bias_update_rate: float = 1e-3
    balance: Balance = "micro_batch"  # over which tokens the balance loss is taken
    aux_loss: float = 0.0  # coefficient of the balance loss
    device_loss: float = 0.0  # the same, of the load of each group of experts
    communication_loss: float = 0.0  # the same, of the tokens that go to each group
    z_loss: float = 0.0  # coefficient of mean(logsumexp(logits)^2)
    jitter: float = 0.0  # the router sees its input times a random number in [1 - jitter, 1 + jitter]

    def at(self, layer: int) -> bool:
        """Return True for a layer, counted from 0, that has experts."""
        return layer >= self.first_dense and layer % self.every == self.offset and layer not in self.dense_layers


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: the widths of what keys, values and queries are made from."""

    rank: int  # of the latent that keys and values share
    nope_dim: int  # of a head's query and key, without position
    rope_dim: int  # of the part that the rotary embedding turns, behind it
    value_dim: int  # of a head's value
    query_rank: int | None = None  # of the latent of the queries; None: they are made straight from the hidden state


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes and switches that decide which tensors a model has and what it computes."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int  # key/value heads; equal to num_heads without grouped queries
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # as in config.json, without rope_theta
    tied: bool = False  # the output layer is the word embedding
    qkv_bias: bool = False
    window: int | None = None  # how many positions a query sees, its own among them, in every layer; None: all
    alibi: bool = False  # linear biases tell positions, not the rotary embedding
    normed_head: bool = False  # the rows of the output layer are used at length one
    qk_norm: bool = False  # RMSNorm over head_dim of q and k before the rotary embedding
    init_std: float = 0.02
    experts: Experts | None = None  # None: every layer is dense
    latent: Latent | None = None  # None: attention with grouped queries; else head_dim is nope_dim + rope_dim

    def has_experts(self, layer: int) -> bool:
        """Return True for a layer, counted from 0, whose feed-forward part is a mixture of experts."""
        return self.experts is not None and self.experts.at(layer)

    @property
    def shared_experts(self) -> bool:
        """True when experts compute every token beside those that are chosen."""
        return self.experts is not None and self.experts.shared_ffn_hidden_size > 0

    @property
    def shared_gate(self) -> bool:
        """True when a gate scales what the shared experts say."""
        return self.experts is not None and self.experts.shared_gate

    @property
    def expert_bias(self) -> bool:
        """True when the router chooses with a bias of each expert."""
        return self.experts is not None and self.experts.bias

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head the rotary embedding turns."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def interleaved(self) -> bool:
        """True when neighbouring dimensions turn together, False when those half a head apart do."""
        return self.latent is not None

    @property
    def query_latent(self) -> bool:
        """True when queries are made from a latent of their own."""
        return self.latent is not None and self.latent.query_rank is not None

    @property
    def plain_query(self) -> bool:
        """True when keys have a latent and queries have none."""
        return self.latent is not None and self.latent.query_rank is None

    @property
    def untied(self) -> bool:
        """True when the output layer has a tensor of its own."""
        return not self.tied

    def layer_products(self, layer: int) -> int:
        """Return the multiplications of weights that one token takes in a layer, counted from 0; scores are not among them."""
        if self.latent is None:
            attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_query_groups)
        else:
            latent, queries = self.latent, self.num_heads * self.head_dim
            attention = self.hidden_size * (latent.rank + latent.rope_dim + self.num_heads * latent.value_dim)
            attention += latent.rank * self.num_heads * (latent.nope_dim + latent.value_dim)
            rank = latent.query_rank
            attention += self.hidden_size * queries if rank is None else rank * (self.hidden_size + queries)
        experts, width = self.experts, self.ffn_hidden_size
        if experts is not None and experts.at(layer):
            width = experts.top_k * experts.ffn_hidden_size + experts.shared_ffn_hidden_size
        return attention + 3 * self.hidden_size * width

    @property
    def head_products(self) -> int:
        """Return those of the output layer."""
        return self.hidden_size * self.vocab_size

    def dimension(self, letter: str) -> int:
        """Return the size that a letter of `Weight.dims` stands for."""
        sizes = {
            "1": 1,
            "v": self.vocab_size,
            "h": self.hidden_size,
            "f": self.ffn_hidden_size,
            "d": self.head_dim,
            "nd": self.num_heads * self.head_dim,
            "gd": self.num_query_groups * self.head_dim,
            "nggd": (self.num_heads + 2 * self.num_query_groups) * self.head_dim,
        }
        if self.experts is not None:
            sizes |= {
                "e": self.experts.count,
                "ef": self.experts.ffn_hidden_size,
                "sf": self.experts.shared_ffn_hidden_size,
            }
        if self.latent is not None:
            latent = self.latent
            sizes |= {
                "l": latent.rank,
                "lr": latent.rank + latent.rope_dim,
                "nkv": self.num_heads * (latent.nope_dim + latent.value_dim),
                "nv": self.num_heads * latent.value_dim,
                "ql": latent.query_rank or 0,
            }
        return sizes[letter]


class Tensors(Protocol):
    """What every checkpoint is, whatever its format: names are known, a tensor is read when it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, on the CPU. It may be a view of a mapped file: never write into it."""
        ...


@dataclass(frozen=True)
class Kind:
    """How one Megatron tensor is packed from Hugging Face tensors and cut over tensor-parallel ranks.

    `pack` makes the whole tensor in a *view* whose dimension `axis` is what tensor parallelism cuts; `unpack` is its
    inverse. A stored shard is the cut view with its first two dimensions merged where `grouped`; `fold` gives such a
    shard its view back.
    """

    name: str
    axis: int | None  # None: every rank holds the whole tensor
    pack: Callable[[Sequence[Tensor], Architecture], Tensor]
    unpack: Callable[[Tensor, Architecture], list[Tensor]]
    fold: Callable[[Tensor, Architecture], Tensor] = field(default=lambda shard, arch: shard)
    grouped: bool = False
    padded: bool = False  # dimension 0 is the vocabulary, padded so that the ranks divide it

    def shard(self, view: Tensor, *, rank: int, size: int, padded_vocab: int) -> Tensor:
        """Return what tensor-parallel rank `rank` of `size` stores, contiguous, from the whole view."""
        if self.padded:
            view = pad_rows(view, padded_vocab)
        if self.axis is not None and size > 1:
            view = view.chunk(size, self.axis)[rank]
        return (view.flatten(0, 1) if self.grouped else view).contiguous()

    def join(self, shards: Sequence[Tensor], arch: Architecture) -> Tensor:
        """Return the whole view from the shards of all tensor-parallel ranks, in rank order."""
        if self.axis is None:
            return self.fold(shards[0], arch)
        return torch.cat([self.fold(shard, arch) for shard in shards], self.axis)


def router_of(config: Mapping[str, Any], own: RouterKind) -> RouterKind:
    """Return the router that config.json asks for: the model's own, or another that it was trained with."""
    router = config.get(ROUTER, own)
    if router not in get_args(RouterKind):
        raise InputError(f"config.json: {ROUTER}={router} is no router; they are {', '.join(get_args(RouterKind))}")
    return router


def pad_vocab(vocab_size: int, tp: int, divisor: int = 1) -> int:
    """Return the smallest multiple of `divisor * tp` that holds the vocabulary (Megatron's rule)."""
    multiple = divisor * tp
    return -(-vocab_size // multiple) * multiple


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return `tensor` with its last row repeated until it has `rows` rows (what the original converter does)."""
    missing = rows - tensor.shape[0]
    return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def _one(tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
    return tensors[0]


def _alone(view: Tensor, arch: Architecture) -> list[Tensor]:
    return [view]


def _pack_qkv(tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
    # [groups, (queries per group + key + value) * head_dim, ...]: a group's queries lie beside its key and value
    return torch.cat([t.reshape(arch.num_query_groups, -1, *t.shape[1:]) for t in tensors], 1)


def _unpack_qkv(view: Tensor, arch: Architecture) -> list[Tensor]:
    queries = arch.num_heads // arch.num_query_groups * arch.head_dim
    parts = view.split([queries, arch.head_dim, arch.head_dim], 1)
    return [part.flatten(0, 1) for part in parts]


def _fold_qkv(shard: Tensor, arch: Architecture) -> Tensor:
    per_group = (arch.num_heads // arch.num_query_groups + 2) * arch.head_dim
    return shard.reshape(-1, per_group, *shard.shape[1:])


replicated = Kind("replicated", None, _one, _alone)
column = Kind("column", 0, _one, _alone)  # output rows are cut
row = Kind("row", 1, _one, _alone)  # input columns are cut
vocab = Kind("vocab", 0, _one, lambda view, arch: [view[: arch.vocab_size]], padded=True)
qkv = Kind("qkv", 0, _pack_qkv, _unpack_qkv, _fold_qkv, grouped=True)
gated = Kind(
    "gated",
    1,
    lambda tensors, arch: torch.stack(tuple(tensors)),  # [gate|up, ffn, hidden]
    lambda view, arch: list(view.unbind(0)),
    lambda shard, arch: shard.reshape(2, -1, *shard.shape[1:]),
    grouped=True,
)


@dataclass(frozen=True)
class Weight:
    """One row of a family: a Megatron name, its kind, and the Hugging Face names it is packed from.

    `{i}` stands for the layer, `{e}` for the expert, `{a,b}` for several tensors in that order. Shapes are words: `v`
    vocabulary, `h` hidden, `f` feed-forward, `d` head, `nd` all query heads, `gd` all key/value heads, `nggd`
    queries, keys and values, `e` experts, `ef` feed-forward of one expert, `sf` feed-forward of the shared experts;
    `l` latent, `lr` latent and rotary part, `nkv` keys and values of all heads, `nv` values of all heads, `ql` latent
    of the queries.
    """

    megatron: str
    kind: Kind
    hf: str
    dims: str  # the shape of the Hugging Face tensors, in the letters of `Architecture.dimension`; `|` between several
    when: str | None = None  # the Architecture switch this row needs
    init: str = "normal"  # normal | scaled (normal / sqrt(2 layers), for what writes the residual) | ones | zeros
    only: Literal["dense", "experts"] | None = None  # which layers have this row; None: all

    def hf_names(self, layer: int | None = None, expert: int | None = None) -> list[str]:
        """Return the Hugging Face names of this row for one layer, and for one expert where it has one for each."""
        name = _numbered(self.hf, layer, expert)
        match = re.search(r"\{([^}]*,[^}]*)\}", name)
        if match is None:
            return [name]
        return [name[: match.start()] + part + name[match.end() :] for part in match[1].split(",")]

    def hf_shapes(self, arch: Architecture) -> list[tuple[int, ...]]:
        """Return the shapes of the Hugging Face tensors, in the order of `hf_names`."""
        shapes = [tuple(arch.dimension(letter) for letter in one.split()) for one in self.dims.split("|")]
        return shapes * len(self.hf_names()) if len(shapes) == 1 else shapes


@dataclass(frozen=True)
class Placed:
    """One row at one place of the model: the global Megatron name and the Hugging Face names behind it."""

    megatron: str
    layer: int | None  # counted over the whole model from 0; None outside the layers
    row: Weight
    hf_names: tuple[str, ...]
    expert: int | None = None  # counted over the layer from 0; None where all tokens meet this tensor


@dataclass(frozen=True)
class Family:
    """A declarative model family: everything the toolchain knows of it."""

    name: str
    hf_classes: tuple[str, ...]  # `architectures` entries of config.json
    architecture: Callable[[Mapping[str, Any]], Architecture]  # config.json -> Architecture
    weights: tuple[Weight, ...]
    sizes: Mapping[str, Mapping[str, Any]]  # preset name -> config.json
    template: str  # the chat template of its instruction models
    routers: Mapping[RouterKind, Mapping[str, Any]] = field(default_factory=dict)  # how its config.json says a router

    def with_router(self, config: Mapping[str, Any], router: RouterKind) -> dict[str, Any]:
        """Return a config.json that says `router`: in the family's own keys where it has them, else in one of ours."""
        others = {key: value for key, value in config.items() if key != ROUTER}
        return {**others, **self.routers.get(router, {ROUTER: router})}

    def placed(self, arch: Architecture) -> Iterator[Placed]:
        """Yield every tensor of a model of this architecture, embedding first, then layer by layer, then the head."""
        rows = [weight for weight in self.weights if weight.when is None or getattr(arch, weight.when)]
        layered = [weight for weight in rows if "{i}" in weight.megatron]
        first = rows.index(layered[0])
        for weight in rows[:first]:
            yield Placed(weight.megatron, None, weight, tuple(weight.hf_names()))
        for i in range(arch.num_layers):
            kind = "experts" if arch.has_experts(i) else "dense"
            for weight in layered:
                if weight.only in (None, kind):
                    for e in _experts(weight, arch):
                        names = tuple(weight.hf_names(i, e))
                        yield Placed(_numbered(weight.megatron, i, e), i, weight, names, e)
        for weight in rows[first:]:
            if weight not in layered:
                yield Placed(weight.megatron, None, weight, tuple(weight.hf_names()))


def _experts(weight: Weight, arch: Architecture) -> Iterable[int | None]:
    """Return the experts that a row stands for."""
    if "{e}" not in weight.megatron:
        return (None,)
    assert arch.experts is not None, f"{weight.megatron}: the architecture has no experts"
    return range(arch.experts.count)


def _numbered(name: str, layer: int | None, expert: int | None) -> str:
    """Put the numbers into a name with `{i}` and `{e}`."""
    for letter, number in (("{i}", layer), ("{e}", expert)):
        if number is not None:
            name = name.replace(letter, str(number))
    return name
