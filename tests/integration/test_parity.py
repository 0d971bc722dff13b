"""Every way to split a run gives the losses, the gradient norms and the weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import runs

RELATIVE = 1e-5  # fp32 sums in another order; measured over these ten steps: losses 2e-7, norms 1.1e-6
# Adam divides a gradient by its own size, so that the rounding of one that is nearly zero would move its weight as far as any
# other. With this eps a weight moves by what its gradient is worth, and weights and moments agree as gradients do.
OPTIM = {"eps": 1e-3}

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}, {}),
    "tp2 sp": (2, {"tp": 2, "sp": True}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "dp2": (2, {"dp": 2}, {}),
    "dp2 distributed": (2, {"dp": 2}, {"distributed": True}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}, {}),
    "tp2 pp2 sp": (4, {"tp": 2, "pp": 2, "sp": True}, {}),
    "tp2 dp2 sp distributed": (4, {"tp": 2, "dp": 2, "sp": True}, {"distributed": True}),
    "pp2 dp2 distributed": (4, {"pp": 2, "dp": 2}, {"distributed": True}),
    "cp2 ring": (2, {"cp": 2}, {}),
    "cp2 ulysses": (2, {"cp": 2, "cp_algorithm": "ulysses"}, {}),
    "cp4 window": (4, {"cp": 4, "cp_window": 2, "cp_overlap": True}, {}),
    "cp4 hybrid": (4, {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}, {}),
    "tp2 cp2 sp": (4, {"tp": 2, "cp": 2, "sp": True}, {}),
    "pp2 cp2": (4, {"pp": 2, "cp": 2}, {}),
    "cp2 dp2 ulysses distributed": (4, {"cp": 2, "cp_algorithm": "ulysses", "dp": 2}, {"distributed": True}),
}
OVERLAP = {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
PIPELINES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # of four layers
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "pp2 vpp2 noop": (2, {"pp": 2, "vpp": 2, "noop_layers": [1, 2, 3, 6]}, {}),  # stage 1, chunk 0 is empty
    "pp2 noop": (2, {"pp": 2, "noop_layers": [0, 5]}, {}),
    "pp2 1+3": (2, {"pp": 2, "layers_per_stage": [1, 3]}, {}),
    "pp2 3+1": (2, {"pp": 2, "layers_per_stage": [3, 1]}, {}),
    "pp4": (4, {"pp": 4}, {}),
    "pp2 vpp2 dp2 distributed": (4, {"pp": 2, "vpp": 2, "dp": 2}, {"distributed": True}),
    "pp2 vpp2 dp2 overlap": (4, {"pp": 2, "vpp": 2, "dp": 2}, OVERLAP),
    "dp2 overlap": (2, {"dp": 2}, OVERLAP),
    "dp2 overlap of the sum": (2, {"dp": 2}, {"overlap_grad_reduce": True}),
    "tp2 pp2 vpp2 sp": (4, {"tp": 2, "pp": 2, "vpp": 2, "sp": True}, {}),
}
EXPERTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}, {}),
    "ep2 allgather": (2, {"ep": 2}, {}),
    "ep2 distributed": (2, {"ep": 2}, {"distributed": True}),
    "ep2 dp4 distributed": (4, {"ep": 2, "dp": 4}, {"distributed": True}),
    "ep2 cp2": (2, {"ep": 2, "cp": 2}, {}),
    "ep2 recompute": (2, {"ep": 2}, {"distributed": True}),  # what balances the experts is made again, and counted once
    "pp2 ep2": (4, {"pp": 2, "ep": 2}, {}),
    "tp2 sp etp1": (2, {"tp": 2, "sp": True, "etp": 1}, {}),
    "tp2 sp etp1 ep2": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}, {"distributed": True}),
    "tp2 sp ep2": (4, {"tp": 2, "sp": True, "ep": 2}, {"distributed": True}),
    "tp2 sp etp1 ep4 allgather": (4, {"tp": 2, "sp": True, "etp": 1, "ep": 4}, {}),
}
SECTIONS: dict[str, dict[str, Any]] = {  # of the recipe, beside parallel and optim
    "ep2 recompute": {"memory": {"recompute": "full"}},
    **{
        layout: {"experts": {"dispatcher": "allgather", "grouped": False}}
        for layout in EXPERTS
        if "allgather" in layout
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"preset": "mixtral-8x7b", "num_local_experts": 4},
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "three layers": {"num_hidden_layers": 3},  # no two stages share them equally
    "four layers": {"num_hidden_layers": 4},
    "four layers tied": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    # query and key norms: replicated weights whose gradients come from split heads
    "qwen3": {"preset": "qwen3-0.6b", "tie_word_embeddings": False},
}


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def alone(where: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process, made once for each model and task."""
    done: dict[tuple[str, str], tuple[list[dict[str, Any]], Path]] = {}

    def run(model: str, task: str) -> tuple[list[dict[str, Any]], Path]:
        if (model, task) not in done:
            folder = tmp_path_factory.mktemp("alone")
            recipe = runs.values(where, folder, task, model={**runs.SIZES, **MODELS[model]}, optim=OPTIM)
            done[model, task] = runs.train(recipe, task), folder
        return done[model, task]

    return run


def _rows() -> list[Any]:
    rows = [(layout, "untied", "pretrain") for layout in LAYOUTS]
    rows += [(layout, "tied", "pretrain") for layout in LAYOUTS if "cp" not in layout or layout == "pp2 cp2"]
    rows += [(layout, "qwen3", "pretrain") for layout in ("tp2 sp", "pp2")]
    rows += [(layout, "three layers", "pretrain") for layout in ("pp2", "pp2 dp2 distributed")]
    rows += [(layout, "four layers", "pretrain") for layout in PIPELINES]
    rows += [(layout, "four layers tied", "pretrain") for layout in ("pp2 vpp2", "pp2 vpp2 dp2 distributed")]
    rows += [("pp2 vpp2", "four layers", "sft")]
    rows += [(layout, "four layers tied", "sft") for layout in ("dp2 overlap", "pp2 vpp2 dp2 overlap")]
    # samples of very different lengths: a mean over micro batches or ranks would weigh their tokens differently
    rows += [(layout, "untied", "sft") for layout in ("pp2", "dp2 distributed", "tp2 pp2 sp")]
    rows += [(layout, "untied", "sft") for layout in ("cp2 ring", "pp2 cp2", "cp4 hybrid")]
    rows += [(layout, "mixtral", "pretrain") for layout in EXPERTS]
    rows += [(layout, "mixtral", "sft") for layout in ("ep2", "tp2 sp ep2")]
    return [pytest.param(*row, id=" ".join(row).replace(" ", "-")) for row in rows]


@pytest.mark.parametrize(("layout", "model", "task"), _rows())
def test_a_split_run_equals_one_process(
    layout: str, model: str, task: str, where: Path, alone: Any, tmp_path: Path
) -> None:
    world, parallel, optim = {**LAYOUTS, **PIPELINES, **EXPERTS}[layout]
    sections = {"parallel": parallel, "optim": {**OPTIM, **optim}, **SECTIONS.get(layout, {})}
    recipe = runs.values(where, tmp_path, task, model={**runs.SIZES, **MODELS[model]}, **sections)
    one, folder = alone(model, task)
    split = runs.train(recipe, task, world=world)
    assert [line["step"] for line in split] == list(range(1, 11))
    assert one[-1]["loss"] < one[0]["loss"] - 0.2  # it learns, so there is something to compare
    assert [line["tokens"] for line in split] == [line["tokens"] for line in one]
    for name in {"loss", "grad_norm", "aux_loss"} & one[0].keys():
        assert [line[name] for line in split] == pytest.approx([line[name] for line in one], rel=RELATIVE), name
    expected = runs.stored(folder / "checkpoints" / "step_10")
    for key, tensor in runs.stored(tmp_path / "checkpoints" / "step_10").items():
        if not key.startswith("random."):
            difference = (tensor - expected[key]).abs().max() / expected[key].abs().max()
            assert difference < RELATIVE, f"{key}: {difference:.2e}"


@pytest.mark.parametrize(
    ("micro", "total", "layout"), [(8, 8, "one"), (1, 8, "one"), (4, 8, "dp2")], ids=["whole", "single", "dp2"]
)
def test_micro_batches_change_nothing(
    micro: int, total: int, layout: str, where: Path, alone: Any, tmp_path: Path
) -> None:
    world, parallel, _ = LAYOUTS.get(layout, (1, {}, {}))
    recipe = runs.values(
        where, tmp_path, "sft", batch={"micro": micro, "global": total}, parallel=parallel, optim=OPTIM
    )
    one, _folder = alone("untied", "sft")
    lines = runs.train(recipe, "sft", world=world)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in one], rel=RELATIVE), name


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2", "dp2 distributed"])
def test_bf16_stays_near_one_process(layout: str, where: Path, tmp_path: Path) -> None:
    world, parallel, optim = LAYOUTS[layout]
    one = runs.train(runs.values(where, tmp_path / "one", precision="bf16"))
    split = runs.train(
        runs.values(where, tmp_path / "split", precision="bf16", parallel=parallel, optim=optim), world=world
    )
    # bf16 keeps 8 bits, and the split sums round elsewhere
    assert [line["loss"] for line in split] == pytest.approx([line["loss"] for line in one], rel=5e-3)
