"""Megatron's own checkpoint folders, one `model_optim_rng.pt` for each tensor- and pipeline-parallel rank.

FOLDER/latest_checkpointed_iteration.txt                   "1"
FOLDER/iter_0000001/mp_rank_00/model_optim_rng.pt          mp_rank_TT where pp = 1
FOLDER/iter_0000001/mp_rank_00_000/model_optim_rng.pt      mp_rank_TT_PPP where pp > 1
FOLDER/hf/                                                 ours: configuration, tokenizer, the source's file plan

A file holds `model`, or `model0`, `model1` ... where a stage has several chunks.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_core.checkpoint.checkpoint import Checkpoint
from mindspeed_core.checkpoint.folder import new_folder
from mindspeed_core.checkpoint.hf import carry_source
from mindspeed_core.checkpoint.tensors import PackedTensors, pack, shard_shape
from mindspeed_core.checkpoint.torch_file import TorchFile, read_torch_file
from mindspeed_core.errors import InputError
from mindspeed_core.models.family import Architecture, Family, Placed, pad_rows, pad_vocab
from mindspeed_core.models.split import command_option, split_problems
from mindspeed_core.parallel.pipeline import Placement

LATEST = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
HF = "hf"

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_FUSED = {  # how Transformer Engine names the norms that it computes inside the linear layer behind them
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_NOT_WEIGHTS = re.compile(r".*(\._extra_state|\.inv_freq)")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks share the model, and how the vocabulary is padded for them."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    noop_layers: tuple[int, ...] = ()
    vocab_divisor: int = 1  # Megatron's --make-vocab-size-divisible-by

    def placement(self, arch: Architecture) -> Placement:
        """Return where the layers of a model lie."""
        return Placement(
            num_layers=arch.num_layers,
            pp=self.pp,
            vpp=self.vpp,
            layers_per_stage=self.layers_per_stage,
            noop_layers=self.noop_layers,
        )

    def problems(self, arch: Architecture) -> list[str]:
        """Return why a model of this architecture cannot be cut so; empty if it can."""
        if arch.experts is not None:
            return ["a model with experts is not written as a Megatron folder by this version; convert it with hf"]
        return split_problems(arch, tp=self.tp, placement=self.placement(arch), name=command_option)

    def padded_vocab(self, arch: Architecture) -> int:
        """Return the number of rows of the embedding over all ranks."""
        return pad_vocab(arch.vocab_size, self.tp, self.vocab_divisor)

    def rank_folder(self, tp_rank: int, stage: int) -> str:
        """Return the name that Megatron gives to the folder of a rank."""
        return f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if self.pp > 1 else "")


def chunk_rows(
    family: Family, arch: Architecture, placement: Placement, stage: int, chunk: int
) -> Iterator[tuple[str, Placed]]:
    """Yield what the ranks of a pipeline stage store of one chunk: the key in the file, and the row behind it.

    Each chunk counts its layers from 0, noop layers too. Where the output layer is the embedding, and that lies on another
    stage, the last one stores a copy of it under the output layer's name.
    """
    places = {layer: local for local, layer in enumerate(placement.held(stage, chunk)) if layer is not None}
    first, last = placement.is_first(stage, chunk), placement.is_last(stage, chunk)
    for placed in family.placed(arch):
        if placed.layer is not None:
            if placed.layer in places:
                yield placed.row.megatron.replace("{i}", str(places[placed.layer])), placed
        elif placed.megatron.startswith("embedding."):
            if first:
                yield placed.megatron, placed
        elif last:
            yield placed.megatron, placed
    if last and not first and arch.tied:
        embedding = next(placed for placed in family.placed(arch) if placed.megatron == _EMBEDDING)
        yield _OUTPUT, embedding


def rank_models(checkpoint: Checkpoint, layout: Layout, stage: int) -> dict[str, dict[str, Tensor]]:
    """Return what the file of one rank of a stage holds, on the meta device; tensor-parallel ranks are alike."""
    arch = checkpoint.architecture
    padded = layout.padded_vocab(arch)

    def model(chunk: int) -> dict[str, Tensor]:
        rows = chunk_rows(checkpoint.family, arch, layout.placement(arch), stage, chunk)
        return {
            key: torch.empty(
                shard_shape(placed, arch, tp=layout.tp, padded_vocab=padded),
                dtype=checkpoint.tensors.dtype(placed.hf_names[0]),
                device="meta",
            )
            for key, placed in rows
        }

    return {_model_key(chunk, layout.vpp): model(chunk) for chunk in range(layout.vpp)}


def _model_key(chunk: int, vpp: int) -> str:
    return f"model{chunk}" if vpp > 1 else "model"


def write_megatron(
    checkpoint: Checkpoint,
    target: Path,
    *,
    layout: Layout,
    overwrite: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
    report: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a Megatron folder, stage by stage.

    The files of a stage's tensor-parallel ranks are written side by side, so that each tensor is read once and never more
    than one of them is in memory. `check` sees the finished folder before it gets its name; `report` hears the size of
    every shard once it is written.
    """
    family, arch, tensors = checkpoint.family, checkpoint.architecture, checkpoint.tensors
    problems = layout.problems(arch)
    if problems:
        raise InputError("\n".join(problems))
    padded = layout.padded_vocab(arch)
    iteration = checkpoint.iteration or 1
    with new_folder(target, overwrite=overwrite) as folder:
        step = folder / f"iter_{iteration:07d}"
        for stage in range(layout.pp):
            document = {
                "args": megatron_args(arch, layout, tensors.dtype(next(iter(family.placed(arch))).hf_names[0])),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                **rank_models(checkpoint, layout, stage),
            }
            with ExitStack() as stack:
                files = []
                for tp_rank in range(layout.tp):
                    path = step / layout.rank_folder(tp_rank, stage) / FILE
                    path.parent.mkdir(parents=True)
                    files.append(stack.enter_context(TorchFile(path, document)))
                placement = layout.placement(arch)
                rows = [row for chunk in range(layout.vpp) for row in chunk_rows(family, arch, placement, stage, chunk)]
                for _, placed in rows:
                    kind = placed.row.kind
                    view = pack(placed, tensors, arch)
                    if kind.padded:
                        view = pad_rows(view, padded)
                    for tp_rank, file in enumerate(files):
                        shard = kind.shard(view, rank=tp_rank, size=layout.tp, padded_vocab=padded)
                        file.write(shard)
                        report(shard.nbytes)
        (folder / LATEST).write_text(str(iteration))
        carry_source(checkpoint.assets, folder / HF, checkpoint.config)
        check(folder)


def megatron_args(arch: Architecture, layout: Layout, dtype: torch.dtype) -> Namespace:
    """Return the arguments that Megatron stores with a checkpoint and compares when it loads one."""
    scaling = arch.rope_scaling or {}
    placement = layout.placement(arch)
    each = [len(placement.chunk_slots(stage)) for stage in range(layout.pp)]
    return Namespace(
        num_layers=placement.slots,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        kv_channels=arch.head_dim,
        group_query_attention=arch.num_query_groups != arch.num_heads,
        num_query_groups=arch.num_query_groups,
        seq_length=arch.max_positions,
        max_position_embeddings=arch.max_positions,
        position_embedding_type="rope",
        add_position_embedding=True,  # Megatron's default; it is compared and means nothing with rope
        use_rotary_position_embeddings=True,
        rotary_base=arch.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=scaling.get("rope_type") == "llama3",
        rope_scaling_factor=scaling.get("factor", 8.0),
        normalization="RMSNorm",
        norm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        untie_embeddings_and_output_weights=arch.untied,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_experts=None,
        make_vocab_size_divisible_by=layout.vocab_divisor,
        vocab_size=arch.vocab_size,
        padded_vocab_size=layout.padded_vocab(arch),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=each[0] if layout.vpp > 1 else None,
        num_layer_list=None if placement.even else each,
        noop_layers=set(layout.noop_layers) or None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        transformer_impl="local",
        use_mcore_models=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


class MegatronTensors(PackedTensors):
    """The tensors of an `iter_*` folder of any tensor- and pipeline-parallel size. The files are mapped, not loaded.

    A chunk may hold any number of layers, and noop layers between them: they are counted in the files.
    """

    def __init__(self, folder: Path, family: Family, arch: Architecture) -> None:
        super().__init__(family, arch)
        if arch.experts is not None:
            raise InputError(
                f"{folder}: is of a model with experts; this version reads Megatron folders of dense models only"
            )
        files = _rank_files(folder)
        documents = {rank: read_torch_file(path) for rank, path in files.items()}
        self.args = _arguments(next(iter(documents.values())))
        self.tp, self.pp = _sizes(folder, files, self.args)
        self._shards: dict[str, dict[int, Tensor]] = {}  # row name -> tensor-parallel rank -> what it stores
        self._files: dict[str, Path] = {}  # row name -> the file that its first shard is in
        models = {rank: _models(path, documents[rank]) for rank, path in files.items()}
        counts = {len(chunks) for chunks in models.values()}
        if len(counts) > 1:
            raise InputError(
                f"{folder}: its files hold {min(counts)} to {max(counts)} chunks (model0, ...); copy it again"
            )
        self.vpp = counts.pop()
        layers = 0
        self.held: dict[tuple[int, int], tuple[int | None, ...]] = {}  # (stage, chunk) -> what lies at each place
        for chunk in range(self.vpp):  # the model runs through chunk 0 of every stage, then through chunk 1 ...
            for stage in range(self.pp):
                parts = {tp_rank: models[tp_rank, stage][chunk] for tp_rank in range(self.tp)}
                found = {int(match[1]) for part in parts.values() for key in part if (match := _LAYER.fullmatch(key))}
                places = {local: layers + i for i, local in enumerate(sorted(found))}
                for tp_rank, part in parts.items():
                    for key, tensor in part.items():
                        name = _global_name(key, places)
                        if (stage, chunk) != (0, 0) and (name == _EMBEDDING or (name == _OUTPUT and arch.tied)):
                            continue  # the last stage's copy of the embedding
                        self._shards.setdefault(name, {})[tp_rank] = tensor
                        self._files.setdefault(name, files[tp_rank, stage])
                self.held[stage, chunk] = tuple(places.get(local) for local in range(max(found, default=-1) + 1))
                layers += len(found)
        if layers != arch.num_layers:
            raise InputError(
                f"{folder}: holds {layers} layers where config.json says num_hidden_layers={arch.num_layers}"
            )
        self._check(folder)
        said = _said_placement(self.args, arch, pp=self.pp, vpp=self.vpp)
        if said is not None and all(_real(said.held(*place)) == _real(held) for place, held in self.held.items()):
            self.held = {place: said.held(*place) for place in self.held}  # the files do not show noop layers at an end

    def packed(self, placed: Placed) -> Tensor:
        shards = [self._shards[placed.megatron][tp_rank] for tp_rank in range(self.tp)]
        if self.tp == 1:
            return placed.row.kind.fold(shards[0], self.arch)
        return placed.row.kind.join(shards, self.arch)

    def packed_dtype(self, placed: Placed) -> torch.dtype:
        return self._shards[placed.megatron][0].dtype

    @property
    def padded_vocab(self) -> int:
        """The number of rows of the embedding over all ranks."""
        return self._shards[_EMBEDDING][0].shape[0] * self.tp

    def _check(self, folder: Path) -> None:
        """Raise unless every row is there, on every rank, in its shape, and nothing else is."""
        rows = {placed.megatron: placed for placed in self.family.placed(self.arch)}
        unknown = [name for name in self._shards if name not in rows and not (name == _OUTPUT and self.arch.tied)]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise InputError(
                f"{self._files[unknown[0]]}: holds {unknown[0]}{more}, which a {self.family.name} model of this "
                "config.json does not have"
            )
        missing = [name for name in rows if len(self._shards.get(name, {})) < self.tp]
        if missing:
            where = self._files.get(missing[0], folder)
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InputError(
                f"{where}: {missing[0]}{more} is missing on some rank; layers are counted over the whole model"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for name, placed in rows.items():
            row = placed.row.megatron
            if row not in shapes:
                shapes[row] = shard_shape(placed, self.arch, tp=self.tp, padded_vocab=self.padded_vocab)
            for tensor in self._shards[name].values():
                if tuple(tensor.shape) != shapes[row] or (
                    placed.row.kind.padded and self.padded_vocab < self.arch.vocab_size
                ):
                    raise InputError(
                        f"{self._files[name]}: {name} has shape {tuple(tensor.shape)} where config.json asks for "
                        f"{shapes[row]} at tp={self.tp}"
                    )


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the file of every (tensor-parallel rank, stage) that has a folder."""
    files = {}
    for path in sorted(folder.iterdir()):
        match = _RANK.fullmatch(path.name)
        if match is None:
            continue
        if match[3] is not None:
            raise InputError(f"{path}: holds experts of one expert-parallel rank; this version reads dense models only")
        files[int(match[1]), int(match[2] or 0)] = path / FILE
    if not files:
        raise InputError(f"{folder}: holds no mp_rank_* folder")
    return files


def _arguments(document: Any) -> Namespace:
    args = document.get("args") if isinstance(document, dict) else None
    return args if isinstance(args, Namespace) else Namespace()


def _sizes(folder: Path, files: dict[tuple[int, int], Path], args: Namespace) -> tuple[int, int]:
    """Return tp and pp, from the names of the folders and what the stored arguments say; raise where they disagree."""
    if (getattr(args, "expert_model_parallel_size", 1) or 1) > 1:
        raise InputError(f"{folder}: was saved with expert parallelism; this version reads dense models only")
    found = tuple(max(rank[axis] for rank in files) + 1 for axis in (0, 1))
    said = (
        getattr(args, "tensor_model_parallel_size", None) or found[0],
        getattr(args, "pipeline_model_parallel_size", None) or found[1],
    )
    tp, pp = max(found[0], said[0]), max(found[1], said[1])
    layout = Layout(tp=tp, pp=pp)
    missing = [rank for rank in ((t, p) for t in range(tp) for p in range(pp)) if rank not in files]
    if missing:
        name = layout.rank_folder(*missing[0])
        raise InputError(
            f"{folder}: {name} is missing ({len(missing)} of {tp * pp} ranks are, of tp={tp} pp={pp}); copy the folder again"
        )
    if found != said:
        raise InputError(
            f"{folder}: has folders for tp={found[0]} pp={found[1]} but was saved with tp={said[0]} pp={said[1]}"
        )
    return tp, pp


def _models(path: Path, document: Any) -> list[dict[str, Tensor]]:
    """Return the weights in one rank's file, chunk by chunk, under the names of the chunk."""
    stored = document if isinstance(document, dict) else {}
    keys = ["model"]
    if "model0" in stored:
        keys = [f"model{chunk}" for chunk in range(sum(bool(re.fullmatch(r"model\d+", str(key))) for key in stored))]
    models = []
    for key in keys:
        model = stored.get(key)
        if not isinstance(model, dict):
            raise InputError(f"{path}: holds no {key}; copy it again")
        if "language_model" in model:
            raise InputError(f"{path}: has Megatron's legacy key names, which this version does not read")
        models.append(
            {
                name: value
                for name, value in model.items()
                if isinstance(value, Tensor) and not _NOT_WEIGHTS.fullmatch(name)
            }
        )
    return models


def _global_name(key: str, places: dict[int, int]) -> str:
    """Return the name of a row, with layers counted over the whole model, from the key in a chunk."""
    match = _LAYER.fullmatch(key)
    if match is None:
        return key
    return f"decoder.layers.{places[int(match[1])]}.{_FUSED.get(match[2], match[2])}"


def _said_placement(args: Namespace, arch: Architecture, *, pp: int, vpp: int) -> Placement | None:
    """Return the placement with the noop layers that the stored arguments name; None where they name none that fit."""
    said = getattr(args, "noop_layers", None)
    numbers = said.split(",") if isinstance(said, str) else said if isinstance(said, set | list | tuple) else ()
    if not numbers or not all(str(number).strip().isdigit() for number in numbers):
        return None
    placement = Placement(num_layers=arch.num_layers, pp=pp, vpp=vpp, noop_layers=tuple(sorted(map(int, numbers))))
    return None if placement.problems(command_option) else placement


def _real(held: tuple[int | None, ...]) -> list[int]:
    return [layer for layer in held if layer is not None]
