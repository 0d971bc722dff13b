"""What a run starts from, what it evaluates, and how it ends when it cannot go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import RankError
from tests.train import runs


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_the_validation_loss_does_not_depend_on_the_layout(task: str, where: Path, tmp_path: Path) -> None:
    # lr 0: all look at the same weights; the validation data does not fill the last batch
    still: dict[str, Any] = {"optim": {"lr": 0.0, "min_lr": 0.0}, "train": {"steps": 2, "eval_every": 2}}
    found = []
    for world, sections in (
        (1, {}),
        (1, {"batch": {"micro": 8, "global": 8}}),
        (2, {"parallel": {"dp": 2}}),
        (2, {"parallel": {"pp": 2}}),
    ):
        recipe = runs.values(where, tmp_path / str(len(found)), task, **{**still, **sections})
        lines = [line for line in runs.train(recipe, task, world=world) if "valid_loss" in line]
        assert [set(line) for line in lines] == [{"step", "valid_loss"}] * 2
        assert lines[0]["valid_loss"] == lines[1]["valid_loss"]
        found.append(lines[0]["valid_loss"])
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


def test_evaluation_leaves_the_run_as_it_is(where: Path, tmp_path: Path) -> None:
    plain = runs.train(runs.values(where, tmp_path / "plain"))
    recipe = runs.values(where, tmp_path / "watched", train={"eval_every": 3, "eval_steps": 1})
    (tmp_path / "watched").mkdir()
    of_a_run_that_saved_nothing = '{"step": 0, "valid_loss": 99.0}\n'
    (tmp_path / "watched" / "metrics.jsonl").write_text(of_a_run_that_saved_nothing)
    watched = runs.train(recipe)
    evaluated = {line["step"]: line["valid_loss"] for line in watched if "valid_loss" in line}
    assert [line["step"] for line in watched if "valid_loss" in line] == [0, 3, 6, 9, 10]
    assert evaluated[0] == pytest.approx(math.log(runs.VOCABULARY), rel=0.02), "random weights know nothing"
    assert evaluated[10] < evaluated[0]
    assert [line["loss"] for line in watched if "loss" in line] == [line["loss"] for line in plain]


def test_a_share_of_the_documents_serves_for_evaluation(where: Path, tmp_path: Path) -> None:
    recipe = runs.values(where, tmp_path, train={"steps": 1, "eval_every": 1}, data={"valid": None, "split": "80,20"})
    assert "valid_loss" in runs.train(recipe)[-1]


def test_a_run_starts_from_the_weights_of_any_checkpoint(where: Path, tmp_path: Path) -> None:
    runs.train(runs.values(where, tmp_path / "first", train={"steps": 2}))
    weights = runs.stored(tmp_path / "first" / "checkpoints" / "step_2")
    model = {"path": str(tmp_path / "first")}  # a run folder stands for its newest checkpoint
    still: dict[str, Any] = {"optim": {"lr": 0.0, "min_lr": 0.0}, "train": {"steps": 1}}
    recipe = {**runs.values(where, tmp_path / "second", parallel={"tp": 2}, **still), "model": model}
    recipe["data"] = {
        name: value for name, value in recipe["data"].items() if name != "tokenizer"
    }  # the model brings it
    runs.train(recipe, world=2)
    for key, tensor in runs.stored(tmp_path / "second" / "checkpoints" / "step_1").items():
        if not key.startswith(("optimizer.", "random.")):
            assert torch.equal(tensor, weights[key]), key

    random = {**recipe, "model": {**model, "init": "random", "num_hidden_layers": 1}}
    random["checkpoint"] = {"folder": str(tmp_path / "third")}
    runs.train(random, world=2)
    fresh = runs.stored(tmp_path / "third" / "checkpoints" / "step_1")
    assert "decoder.layers.1.mlp.linear_fc2.weight" not in fresh
    assert not torch.equal(fresh["embedding.word_embeddings.weight"], weights["embedding.word_embeddings.weight"])


def test_norms_and_biases_do_not_decay(where: Path, tmp_path: Path) -> None:
    # with hardly any rate from the gradient, a decay of 1/lr takes away what it is applied to
    optim = {"lr": 1e-6, "min_lr": 1e-6, "schedule": "constant", "warmup": 0, "weight_decay": 5e5}
    model = {**runs.SIZES, "preset": "qwen2.5-0.5b"}  # which has biases
    recipe = {**runs.values(where, tmp_path, train={"steps": 1}), "optim": optim, "model": model}
    runs.train(recipe)
    weights = runs.stored(tmp_path / "checkpoints" / "step_1")
    assert weights["decoder.layers.0.input_layernorm.weight"].mean() > 0.99
    assert weights["decoder.layers.0.self_attention.linear_qkv.weight"].std() < 0.02 * 0.6  # half of 0.02


def test_a_run_that_diverges_says_what_to_do(where: Path, tmp_path: Path) -> None:
    recipe = runs.values(where, tmp_path, optim={"lr": 1e30, "warmup": 0})
    with pytest.raises(RankError, match=r"the run has diverged\. Lower optim\.lr \(now 9\.76e\+29\)"):
        runs.train(recipe)
    assert not any((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("deterministic", [True])
def test_the_same_recipe_gives_the_same_bits(deterministic: bool, where: Path, tmp_path: Path) -> None:
    lines = [
        runs.train(runs.values(where, tmp_path / name, train={"steps": 3, "deterministic": deterministic}))
        for name in ("one", "two")
    ]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    other = runs.train(runs.values(where, tmp_path / "three", train={"steps": 3, "seed": 7}))
    assert [line["loss"] for line in lines[0]] != [line["loss"] for line in other]
