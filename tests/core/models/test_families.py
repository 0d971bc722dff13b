"""Every family computes what transformers computes, on one rank and split, and gives its weights back unchanged."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mindspeed_core.device import Device
from mindspeed_core.errors import InputError
from mindspeed_core.models.families import FAMILIES, family_of, preset
from mindspeed_core.models.family import Architecture, Experts, Family, Tensors, pad_vocab
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from tests.core.models.tiny import CLASSES, StateTensors, config_of, hf_model
from tests.harness import run_ranks

# fp32: two orders of summation of a few hundred terms of size one
LOGITS = 1e-5
Variant = tuple[str, bool, int, dict[str, Any]]  # family, tied, key heads, keys of config.json
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
ANY = [name for name in CLASSES if name != "baichuan"]  # may be tied, and group their queries
VARIANTS: list[Variant] = [(*variant, {}) for variant in itertools.product(ANY, (True, False), (4, 8))]
VARIANTS += [
    ("mistral", False, 4, {"sliding_window": None}),
    ("mixtral", False, 4, {"sliding_window": 5}),
    ("qwen2", False, 4, SLIDING),
    ("qwen3", False, 4, SLIDING),
    ("baichuan", False, 8, {}),
    ("baichuan", False, 8, {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8, "hidden_size": 48}),
    ("baichuan", False, 8, {"max_position_embeddings": 128}),  # rotary, as the models of 7B
    ("baichuan", False, 8, {"vocab_size": 125_696, "num_hidden_layers": 1}),  # Baichuan2's output layer
]
SPLIT = [(name, tied, 4 if tied else 8) for name in ANY for tied in (True, False)] + [("baichuan", False, 8)]


def _batch(vocab: int = 99) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, vocab, (2, 12), generator=generator) for _ in range(2))
    return tokens, labels, torch.rand(2, 12, generator=generator)


def _build(model: Any, mesh: Mesh) -> tuple[Any, Any, Architecture]:
    from mindspeed_core.models.build import build_model
    from mindspeed_core.models.weights import load_weights

    config = config_of(model)
    family = family_of(config)
    arch = family.architecture(config)
    chunks = build_model(arch, mesh)
    load_weights(chunks, StateTensors(model), family, arch, mesh)
    return chunks[0], family, arch


def compare_alone(variants: list[Variant]) -> list[tuple[float, float, float]]:
    """Per variant: the largest relative difference of logits, of the loss and of the embedding's gradient."""
    differences = []
    mesh = Mesh.create(ParallelConfig(), Device.open("cpu"))
    for name, tied, groups, keys in variants:
        reference = hf_model(name, tied=tied, groups=groups, **keys)
        ours, _family, _arch = _build(reference, mesh)
        tokens, labels, weights = _batch()
        expected = reference(tokens).logits
        with torch.no_grad():
            got = ours.full_logits(ours(tokens))
            # an evaluation's layers add and norm in one kernel, and change no bit
            assert torch.equal(ours.eval().full_logits(ours(tokens)), got), name
        ours.train()
        loss = ours(tokens, labels=labels, weights=weights)
        loss.backward()
        oracle = (F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none") * weights.flatten()).sum()
        oracle.backward()
        gradient = reference.get_input_embeddings().weight.grad
        differences.append(
            (
                ((got - expected).abs().max() / expected.abs().max()).item(),
                ((loss - oracle).abs() / oracle).item(),
                ((ours.embedding.word_embeddings.weight.grad - gradient).abs().max() / gradient.abs().max()).item(),
            )
        )
    return differences


def test_logits_loss_and_gradient_equal_transformers():
    for variant, differences in zip(VARIANTS, run_ranks(compare_alone, 1, VARIANTS)[0], strict=True):
        assert max(differences) < LOGITS, f"{variant}: logits, loss, gradient differ by {differences}"


def split_logits(variants: list[tuple[str, bool, int]], parallel: dict[str, Any], folder: str) -> list[Any]:
    """Per variant: on the last stage the whole logits, and which weights a training checkpoint gives back bit for bit."""
    answers = []
    mesh = Mesh.create(ParallelConfig(**parallel), Device.open("cpu"))
    for number, (name, tied, groups) in enumerate(variants):
        reference = hf_model(name, tied=tied, groups=groups)
        ours, family, arch = _build(reference, mesh)
        tokens, _labels, _weights = _batch()
        with torch.no_grad():
            if not mesh.is_first_stage:
                hidden = torch.empty(12 // (mesh.tp.size if parallel.get("sp") else 1), 2, 64)
                torch.distributed.recv(hidden, group_src=mesh.pp.rank - 1, group=mesh.pp.group)
                ours.set_input_tensor(hidden)
            out = ours(tokens)
            if not mesh.is_last_stage:
                torch.distributed.send(out.contiguous(), group_dst=mesh.pp.rank + 1, group=mesh.pp.group)
        logits = ours.full_logits(out) if mesh.is_last_stage else None
        state = StateTensors(reference)
        saved = _saved(Path(folder) / str(number), ours, family, arch, mesh)
        same = {hf_name: torch.equal(saved[hf_name], state[hf_name]) for hf_name in saved.names()}
        difference = None
        if logits is not None:
            expected = reference(tokens).logits
            difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        answers.append((difference, same))
    return answers


def _saved(folder: Path, model: Any, family: Family, arch: Architecture, mesh: Mesh) -> Tensors:
    """Return what a training checkpoint of the model holds, in Hugging Face names."""
    from mindspeed_core.checkpoint import native
    from mindspeed_core.checkpoint.native_tensors import NativeTensors
    from mindspeed_core.optim.build import OptimConfig, build_optimizer
    from mindspeed_core.parallel.data import wrap_data_parallel

    chunks = wrap_data_parallel([model], OptimConfig(), mesh)
    optimizer = build_optimizer(OptimConfig(), chunks, mesh, "fp32")
    state = native.State(chunks=chunks, optimizer=optimizer, mesh=mesh, vocab_size=arch.vocab_size)
    return NativeTensors(native.save(folder, state, native.Progress()), family, arch)


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"tp": 2, "pp": 2}],
    ids=lambda parallel: "-".join(f"{key}={value}" for key, value in parallel.items()),
)
def test_a_split_model_computes_the_same_and_gives_its_weights_back(tmp_path: Path, parallel: dict[str, Any]):
    world = parallel.get("tp", 1) * parallel.get("pp", 1)
    by_rank = run_ranks(split_logits, world, SPLIT, parallel, str(tmp_path))
    for i, variant in enumerate(SPLIT):
        stored = set(StateTensors(hf_model(variant[0], tied=variant[1], groups=variant[2])).names())
        stored -= {"lm_head.weight"} if variant[1] else set()  # a tied output layer is stored under two names
        assert by_rank[0][i][1] == dict.fromkeys(stored, True), f"{variant}: weights came back changed"
        difference = by_rank[-1][i][0]
        assert difference is not None
        assert difference < LOGITS, f"{variant}: logits differ by {difference}"


@pytest.mark.parametrize("kind", sorted({row.kind.name for family in FAMILIES.values() for row in family.weights}))
def test_a_kind_joins_what_it_cut(kind: str):
    arch = Architecture(
        num_layers=1, hidden_size=8, ffn_hidden_size=12, num_heads=4, num_query_groups=2, head_dim=4, vocab_size=7,
        max_positions=16, experts=Experts(count=2, top_k=1, ffn_hidden_size=6, shared_ffn_hidden_size=6),
    )  # fmt: skip
    row = next(row for family in FAMILIES.values() for row in family.weights if row.kind.name == kind)
    tensors = [torch.randn(shape) for shape in row.hf_shapes(arch)]
    for size in (1, 2):
        view = row.kind.pack(tensors, arch)
        cut = [
            row.kind.shard(view, rank=rank, size=size, padded_vocab=pad_vocab(arch.vocab_size, size))
            for rank in range(size)
        ]
        back = row.kind.unpack(row.kind.join(cut, arch), arch)
        assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))


def test_every_preset_has_an_architecture_whose_rows_are_complete():
    for family in FAMILIES.values():
        for name in family.sizes:
            config = preset(name)
            assert family_of(config) is family
            arch = family.architecture(config)
            names = [hf for placed in family.placed(arch) for hf in placed.hf_names]
            assert len(names) == len(set(names))


def test_preset_sizes_equal_the_published_parameter_counts():
    published = {"llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920, "smollm2-135m": 134_515_008, "tinyllama-1.1b": 1_100_048_384, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552, "mixtral-8x7b": 46_702_792_704, "baichuan-13b": 13_264_901_120, "baichuan2-7b": 7_505_973_248, "deepseek-v2-lite": 15_706_484_224, "deepseek-v3": 671_026_419_200}  # fmt: skip
    for name, expected in published.items():
        config = preset(name)
        family = family_of(config)
        arch = family.architecture(config)
        shapes = [shape for placed in family.placed(arch) for shape in placed.row.hf_shapes(arch)]
        assert sum(torch.Size(shape).numel() for shape in shapes) == expected, name


@pytest.mark.parametrize("name", ["llama3-8b", "qwen2.5-0.5b", "deepseek-v2-lite", "deepseek-v3", "mixtral-8x7b"])
def test_the_products_of_a_layer_are_those_of_its_matrices(name: str):
    config = preset(name)
    family = family_of(config)
    arch = family.architecture(config)
    products = [0.0] * arch.num_layers
    for placed in family.placed(arch):
        chosen = 1 if arch.experts is None or placed.expert is None else arch.experts.top_k / arch.experts.count
        matrices = [shape for shape in placed.row.hf_shapes(arch) if len(shape) == 2]
        if placed.layer is not None and "router" not in placed.megatron:
            products[placed.layer] += sum(torch.Size(shape).numel() for shape in matrices) * chosen
    assert [arch.layer_products(i) for i in range(arch.num_layers)] == pytest.approx(products)
    assert arch.head_products == arch.vocab_size * arch.hidden_size


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "it knows LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, "num_hidden_layers"),
        ({**preset("llama2-7b"), "attention_bias": True}, "attention_bias=True"),
        ({**preset("llama2-7b"), "hidden_act": "gelu"}, "hidden_act=gelu"),
        ({**preset("deepseek-v3"), "scoring_func": "softmax"}, "scoring_func=softmax is not supported for DeepSeek-V3"),
        ({**preset("mistral-7b-v0.1"), "sliding_window": 0}, "sliding_window=0 is no number of positions"),
        (
            {**preset("qwen2.5-14b"), "use_sliding_window": True, "max_window_layers": 40},
            "8 of 48 layers have a sliding window",
        ),
        (
            {
                **preset("mixtral-8x7b"),
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"] * 16,
            },
            "16 of 32 layers have a sliding window",
        ),
    ],
)
def test_a_configuration_we_cannot_build_is_refused(config: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        family_of(config).architecture(config)


@pytest.mark.parametrize(
    ("name", "keys", "window"),
    [
        ("mistral-7b-v0.1", {}, 4096),
        ("mistral-7b-v0.1", {"layer_types": ["full_attention"] * 32}, None),
        ("mistral-7b-v0.3", {}, None),
        ("mixtral-8x7b", {}, None),
        ("mixtral-8x7b", {"sliding_window": 9}, 9),
        ("qwen2.5-7b", {"sliding_window": 9}, None),  # is there, and is not used
        ("qwen2.5-7b", {"use_sliding_window": True, "sliding_window": 9}, None),  # of layer 28 on, and there is none
        ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
        ("qwen3-8b", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 36}, 4096),
        ("qwen3-8b", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
    ],
)
def test_a_window_is_read_as_transformers_reads_it(name: str, keys: dict[str, Any], window: int | None):
    config = {**preset(name), **keys}
    assert family_of(config).architecture(config).window == window


def test_a_mistral_configuration_without_the_key_has_its_default_window():
    config = preset("mistral-7b-v0.1")
    del config["sliding_window"]
    assert family_of(config).architecture(config).window == 4096


@pytest.mark.parametrize(
    ("name", "router", "said"),
    [
        ("mixtral-8x7b", "aux_loss", {}),
        ("mixtral-8x7b", "sinkhorn", {"mindspeed_router": "sinkhorn"}),
        ("deepseek-v2", "softmax_topk", {"topk_method": "greedy"}),  # which transformers reads too
        ("deepseek-v2", "group_limited_greedy", {"topk_method": "group_limited_greedy"}),
        ("deepseek-v2", "aux_loss", {"mindspeed_router": "aux_loss"}),
        ("deepseek-v3", "noaux_tc", {}),
        ("deepseek-v3", "softmax_topk", {"mindspeed_router": "softmax_topk"}),
    ],
)
def test_a_router_is_said_in_the_keys_of_the_family(name: str, router: Any, said: dict[str, str]):
    config = preset(name)
    family = family_of(config)
    for before in (config, {**config, "mindspeed_router": "sparsemixer"}):
        after = family.with_router(before, router)
        assert after == {**config, **said}
        experts = family.architecture(after).experts
        assert experts is not None
        assert experts.router == router


def test_a_router_that_is_none_is_refused():
    with pytest.raises(InputError, match="mindspeed_router=dice is no router; they are aux_loss"):
        family_of(preset("mixtral-8x7b")).architecture({**preset("mixtral-8x7b"), "mindspeed_router": "dice"})


def test_an_unknown_preset_is_met_with_the_nearest():
    with pytest.raises(InputError, match="did you mean qwen3"):
        preset("qwen3-06b")
