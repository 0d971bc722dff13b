"""Mixtures of experts through whole runs: balance, bias, saving and splitting anew, generation, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_core.checkpoint import open_checkpoint
from mindspeed_core.checkpoint.hf import write_hf
from mindspeed_core.generate.engine import Engine
from mindspeed_core.generate.sampling import SamplingConfig
from tests.core.engines import run
from tests.harness import run_ranks
from tests.train import runs
from tests.train.models import LATENT

MIXTRAL: dict[str, Any] = {**runs.SIZES, "preset": "mixtral-8x7b", "num_local_experts": 4}
NOAUX: dict[str, Any] = {
    **LATENT, "preset": "deepseek-v3", "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1
}  # fmt: skip
SIX: dict[str, Any] = {"train": {"steps": 6}}


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


def _equal(lines: list[dict[str, Any]], others: list[dict[str, Any]], *names: str, rel: float = 1e-5) -> None:
    for name in names:
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in others], rel=rel), name


def _family() -> Any:
    """A family with everything at once: a dense layer, shared experts behind a gate, a bias that follows the load."""
    from mindspeed_core.models.families.llama import WEIGHTS, decoder
    from mindspeed_core.models.families.mixtral import DENSE
    from mindspeed_core.models.family import Architecture, Experts, Family, Weight, gated, replicated, row

    def architecture(config: Any) -> Architecture:
        experts = Experts(
            count=4, top_k=2, ffn_hidden_size=16, shared_ffn_hidden_size=24, shared_gate=True, first_dense=1,
            router="noaux_tc", groups=2, topk_groups=1, normalize=True, scaling=2.5, bias=True, bias_update_rate=0.01,
            balance="sequence", aux_loss=0.01, z_loss=0.001,
            device_loss=0.002, communication_loss=0.003,
        )  # fmt: skip
        return Architecture(**decoder(config), experts=experts)

    layer = "decoder.layers.{i}.mlp"
    hf = "model.layers.{i}.mlp"
    return Family(
        name="everything",
        hf_classes=("EverythingForCausalLM",),
        architecture=architecture,
        weights=(
            *(weight for weight in WEIGHTS[:-2] if not weight.megatron.startswith(DENSE)),
            Weight(f"{layer}.linear_fc1.weight", gated, f"{hf}.{{gate,up}}_proj.weight", "f h", only="dense"),
            Weight(f"{layer}.linear_fc2.weight", row, f"{hf}.down_proj.weight", "h f", only="dense"),
            Weight(f"{layer}.router.weight", replicated, f"{hf}.gate.weight", "e h", only="experts"),
            Weight(f"{layer}.router.expert_bias", replicated, f"{hf}.bias", "e", only="experts", when="expert_bias", init="zeros"),
            Weight(f"{layer}.experts.local_experts.{{e}}.linear_fc1.weight", gated, f"{hf}.experts.{{e}}.{{gate,up}}_proj.weight", "ef h", only="experts"),
            Weight(f"{layer}.experts.local_experts.{{e}}.linear_fc2.weight", row, f"{hf}.experts.{{e}}.down_proj.weight", "h ef", only="experts"),
            Weight(f"{layer}.shared_experts.linear_fc1.weight", gated, f"{hf}.shared.{{gate,up}}_proj.weight", "sf h", only="experts"),
            Weight(f"{layer}.shared_experts.linear_fc2.weight", row, f"{hf}.shared.down_proj.weight", "h sf", only="experts"),
            Weight(f"{layer}.shared_experts.gate_weight", replicated, f"{hf}.shared_gate.weight", "1 h", only="experts", when="shared_gate"),
            *WEIGHTS[-2:],
        ),
        sizes={},
        template="llama2",
    )  # fmt: skip


def trains_everything(recipe: dict[str, Any]) -> None:
    from mindspeed_core.models.families import FAMILIES

    FAMILIES["everything"] = _family()
    runs.trains(recipe, "pretrain")


EVERYTHING: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}, {"overlap": True}),
    "ep2 allgather": (2, {"ep": 2}, {"overlap": True, "dispatcher": "allgather"}),
    "tp2 sp ep2 etp1": (2, {"tp": 2, "sp": True, "ep": 2, "etp": 1}, {}),
    "pp2": (2, {"pp": 2}, {"grouped": False}),
    "tp2 sp ep2": (4, {"tp": 2, "sp": True, "ep": 2}, {"overlap": True}),
}


@pytest.fixture(scope="session")
def plain(where: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The configuration of such a model, and its run in one process."""
    folder = tmp_path_factory.mktemp("everything")
    config = {name: value for name, value in runs.SIZES.items() if name != "preset"}
    config.update(num_hidden_layers=3, architectures=["EverythingForCausalLM"], rms_norm_eps=1e-5)
    (folder / "config.json").write_text(json.dumps(config))
    model = {"path": str(folder), "init": "random"}
    run_ranks(trains_everything, 1, _everything(where, folder / "run", model), timeout=120)
    return model, folder / "run"


def _everything(where: Path, folder: Path, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    recipe = runs.values(where, folder, train={"steps": 5}, **sections)
    return {**recipe, "model": model}


@pytest.mark.parametrize("layout", EVERYTHING)
def test_shared_experts_and_a_bias_that_follows_the_load_are_those_of_one_process(
    layout: str, where: Path, plain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    world, parallel, experts = EVERYTHING[layout]
    model, folder = plain
    run_ranks(
        trains_everything, world, _everything(where, tmp_path, model, parallel=parallel, experts=experts), timeout=120
    )
    one, split = runs.metrics(folder), runs.metrics(tmp_path)
    _equal(split, one, "loss", "grad_norm", "aux_loss", "device_loss", "communication_loss", "z_loss")
    assert one[0]["aux_loss"] == pytest.approx(1.0, abs=0.2)
    stored, expected = (runs.stored(path / "checkpoints" / "step_5") for path in (tmp_path, folder))
    assert stored.keys() - expected.keys() == {
        key for key in stored if key.startswith("random.rank_") and "rank_0" not in key
    }
    moved: list[float] = []
    for layer in (1, 2):
        bias = stored[f"decoder.layers.{layer}.mlp.router.expert_bias"]
        assert torch.equal(bias, expected[f"decoder.layers.{layer}.mlp.router.expert_bias"])
        moved.append(bias.abs().max().item())
        assert bias.div(0.01).sub(bias.div(0.01).round()).abs().max() < 1e-3
    assert max(moved) > 0.009


@pytest.fixture(scope="module")
def followed(where: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small DeepSeek-V3 in one process."""
    folder = tmp_path_factory.mktemp("followed")
    runs.train(_noaux(where, folder))
    return folder


def _noaux(where: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    return {**runs.values(where, folder, **SIX, **sections, experts={"bias_update_rate": 0.01}), "model": NOAUX}


@pytest.mark.parametrize("parallel", [{"ep": 2}, {"tp": 2, "sp": True, "pp": 2}], ids=str)
def test_the_bias_of_noaux_tc_follows_the_load_of_all_ranks(
    parallel: dict[str, Any], where: Path, followed: Path, tmp_path: Path
) -> None:
    runs.train(_noaux(where, tmp_path, parallel=parallel), world=4 if "pp" in parallel else 2)
    _equal(runs.metrics(tmp_path), runs.metrics(followed), "loss", "grad_norm", "aux_loss")
    one, split = open_checkpoint(followed).tensors, open_checkpoint(tmp_path).tensors
    names = [name for name in one.names() if name.endswith("e_score_correction_bias")]
    assert len(names) == NOAUX["num_hidden_layers"] - 1
    assert all(torch.equal(split[name], one[name]) for name in names)
    assert max(one[name].abs().max().item() for name in names) > 0.009


def test_what_a_bias_has_learned_is_read_by_transformers(followed: Path, tmp_path: Path) -> None:
    import transformers

    write_hf(open_checkpoint(followed), tmp_path / "exported")
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "exported").eval()
    prompt = [5, 17, 80]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    step = open_checkpoint(followed)
    sent = dict(step.config), {name: step.tensors[name].clone() for name in step.tensors.names()}
    assert run({}, (greedy, sent, prompt)) == [expected[0, 3:].tolist()]
    ours = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert ours
    assert max(bias.abs().max().item() for bias in ours) > 0.009


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, {"ep": 2}, {"distributed": True}), (1, {}, {})),
        ((1, {}, {}), (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}, {"distributed": True})),
        ((2, {"tp": 2, "sp": True}, {}), (2, {"ep": 2}, {})),
    ],
    ids=["ep2-one", "one-etp1", "etp2-ep2"],
)
def test_a_run_goes_on_with_its_experts_elsewhere(before: Any, after: Any, where: Path, tmp_path: Path) -> None:
    def recipe(folder: Path, parallel: dict[str, Any], optim: dict[str, Any]) -> dict[str, Any]:
        checkpoint = {"every": 3, "folder": str(folder)}
        return runs.values(where, folder, **SIX, model=MIXTRAL, parallel=parallel, optim=optim, checkpoint=checkpoint)

    straight = runs.train(recipe(tmp_path / "straight", {}, {}))
    runs.stop(recipe(tmp_path / "run", *before[1:]), world=before[0])
    lines = runs.train(recipe(tmp_path / "run", *after[1:]), world=after[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    _equal(lines, straight, "loss", "grad_norm", "aux_loss")


def test_a_resumed_run_with_experts_is_the_straight_run_bit_for_bit(where: Path, tmp_path: Path) -> None:
    def recipe(folder: Path) -> dict[str, Any]:
        checkpoint = {"every": 3, "folder": str(folder)}
        parallel, experts = {"ep": 2}, {"jitter": 0.1, "router": "sparsemixer"}  # what draws goes on drawing
        return runs.values(
            where, folder, **SIX, model=MIXTRAL, parallel=parallel, experts=experts, checkpoint=checkpoint
        )

    straight = runs.train(recipe(tmp_path / "straight"), world=2)
    runs.stop(recipe(tmp_path / "run"), world=2)
    lines = runs.train(recipe(tmp_path / "run"), world=2)
    assert [line["loss"] for line in lines] == [line["loss"] for line in straight]
    one, other = (runs.stored(tmp_path / name / "checkpoints" / "step_6") for name in ("straight", "run"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("drop", ["probs", "position"])
def test_padding_to_the_capacity_changes_nothing_but_the_shapes(drop: str, where: Path, tmp_path: Path) -> None:
    def train(name: str, **more: Any) -> list[dict[str, Any]]:
        experts = {"capacity_factor": 1.0, "drop": drop, **more}
        return runs.train(runs.values(where, tmp_path / name, **SIX, model=MIXTRAL, experts=experts))

    dropped = train("dropped")
    _equal(train("padded", pad_to_capacity=True), dropped, "loss", "grad_norm")
    _equal(train("gathered", dispatcher="allgather"), dropped, "loss", "grad_norm")
    dropless = runs.train(runs.values(where, tmp_path / "dropless", **SIX, model=MIXTRAL))
    assert dropless[0]["loss"] != pytest.approx(dropped[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("router", ["softmax_topk", "sinkhorn", "sparsemixer"])
def test_a_model_learns_with_another_router(router: str, where: Path, tmp_path: Path) -> None:
    lines = runs.train(runs.values(where, tmp_path, model=MIXTRAL, experts={"router": router, "z_loss": 1e-3}))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert lines[0]["z_loss"] > 0
    step = open_checkpoint(tmp_path)
    write_hf(step, tmp_path / "exported")
    for opened in (step, open_checkpoint(tmp_path / "exported")):
        assert opened.architecture.experts is not None
        assert opened.architecture.experts.router == router


@pytest.fixture(scope="module")
def published() -> Any:
    """A Mixtral of transformers."""
    from tests.core.models.tiny import hf_model

    return hf_model("mixtral")


def greedy(engine: Engine, prompt: list[int]) -> list[int]:
    return list(engine.generate(prompt, SamplingConfig(max_new_tokens=10)))


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"pp": 2}], ids=["one", "tp2", "pp2"])
def test_generation_is_that_of_transformers(parallel: dict[str, int], published: Any) -> None:
    from tests.core.models.tiny import StateTensors, config_of

    source = StateTensors(published)
    sent = config_of(published), {name: source[name] for name in source.names()}
    prompt = [5, 17, 80]
    expected = published.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert run(parallel, (greedy, sent, prompt)) == [expected[0, 3:].tolist()]
