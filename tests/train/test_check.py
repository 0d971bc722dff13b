"""Recipes that cannot run: each is told in one line, all of them at once, before any rank starts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.errors import InputError
from mindspeed_core.recipe import load
from mindspeed_train.check import check
from mindspeed_train.config import Recipe
from mindspeed_train.tasks import TASKS
from tests.tiny import tiny_tokenizer
from tests.train import runs

MIXTRAL: dict[str, Any] = {**runs.SIZES, "preset": "mixtral-8x7b", "num_local_experts": 4}
GONE: Any = object()  # a key that the recipe lacks


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.material(tmp_path_factory.mktemp("material"))
    tiny_tokenizer(folder / "other", size=320)
    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_data.sidecar import Sidecar

    runs.text(folder / "named", 3, seed=0)
    known = Sidecar(
        kind="pretrain",
        tokenizer="elsewhere",
        fingerprint=Tokenizer.load(folder / "tokenizer").fingerprint,
        vocab_size=326,
        dtype="int32",
        kept=3,
        left_out={},
        tokens=9,
        learned=9,
        longest=9,
        inputs=[],
    )
    (folder / "named_text_document.meta.json").write_text(known.text())
    (folder / "empty").mkdir()
    return folder


def _told(recipe: dict[str, Any], folder: Path, task: str, overrides: list[str], world: int) -> list[str]:
    """The lines that `mindspeed-train` would write."""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    try:
        check(load(Recipe, file, overrides), TASKS[task], world_size=world)
    except InputError as error:
        return [re.sub(rf"^{re.escape(str(file))}(:1)?: ", "", line) for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"parallel": {"tp": 4}}, "parallel.tp=4 does not divide num_key_value_heads=2; use 1 or 2"),
        ({"parallel": {"pp": 4}}, "parallel.pp=4 is more stages than num_hidden_layers=2; use at most 2"),
        ({"parallel": {"sp": True}}, "parallel.sp: cuts what tp leaves whole and needs tp of at least 2; set parallel.tp too"),
        (
            {"parallel": {"tp": 2, "sp": True}, "data": {"seq_length": 31}},
            "parallel.sp cuts every sequence over tp=2 ranks, which does not divide data.seq_length=31; use 30",
        ),
        (
            {"parallel": {"dp": 3}},
            "batch.global: 8 is not a multiple of batch.micro=2 times dp=3; use 6 or 12",
        ),
        ({"batch": {"micro": 3}}, "batch.global: 8 is not a multiple of batch.micro=3 times dp=1; use 6 or 9"),
        (
            {"data": {"seq_length": 65}},
            "data.seq_length=65 is more than the max_position_embeddings=64 of the model; use at most 64",
        ),
        ({"model": {"preset": "lama2-7b"}}, "model.preset=lama2-7b: no such preset; did you mean llama2-7b?"),
        ({"model": {"preset": "llama2-7b", "path": "x"}}, "model: give either path (a checkpoint) or preset (a named size with random weights)"),
        ({"model": {"num_hiden_layers": 3}}, "model.num_hiden_layers: llama2-7b has no such key; did you mean num_hidden_layers?"),
        ({"model": {"num_hidden_layers": "3"}}, "model.num_hidden_layers='3': llama2-7b holds 32 there"),
        ({"model": {"vocab_size": 300}}, "data.tokenizer=WHERE/tokenizer: has 326 ids, more than the vocab_size=300 of the model; use its own tokenizer, or set model.vocab_size=326"),
        ({"model": GONE}, "model: is missing; give it"),
        ({"data": {"train": "WHERE/nothing"}}, "WHERE/nothing: no data set of that prefix"),
        ({"data": {"train": "WHERE/chat"}}, "WHERE/chat: this is instruction data; train on it with sft"),
        ({"data": {"tokenizer": GONE}}, "data.tokenizer: is needed, since a preset has none; give the folder of the one the data was made with"),
        ({"data": {"tokenizer": "WHERE/nowhere"}}, "WHERE/nowhere: no such folder; a tokenizer is a folder with"),
        ({"data": {"tokenizer": "WHERE/other", "train": "WHERE/named", "valid": GONE}}, "WHERE/named: was made with"),
        ({"data": {"split": "9,1"}}, "data.split: takes the validation data from data.train, but data.valid is given; leave one out"),
        ({"data": {"valid": GONE}, "train": {"eval_every": 2}}, "train.eval_every: needs data to evaluate on; give data.valid, or data.split: 95,5"),
        ({"precision": "fp16"}, "precision: this version trains in fp32 or bf16; use bf16"),
        ({"optim": {"reuse_fp32_param": True}}, "optim.reuse_fp32_param: shares the memory of bf16 weights and their fp32 masters, and precision=fp32 has none; use precision: bf16"),
        ({"optim": {"overlap_param_gather": True}}, "optim.overlap_param_gather: only a distributed optimizer gathers; set optim.distributed too"),
        ({"optim": {"warmup": 2.5}}, "optim.warmup: 2.5 is neither a fraction below 1 nor a whole number of steps"),
        ({"optim": {"lr": 1e-4}}, "optim: min_lr=0.001 is above lr=0.0001; the schedule falls from lr to min_lr"),
        ({"parallel": {"vpp": 2}}, "parallel.vpp=2: cuts pipeline stages into chunks and needs pp of at least 2"),
        ({"parallel": {"pp": 2, "vpp": 2}}, "parallel.vpp=2: pp=2 x vpp=2 = 4 chunks cannot share 2 layers equally; use vpp=1, or add 2 more to noop_layers"),
        ({"parallel": {"pp": 2, "vpp": 2, "dp": 1, "noop_layers": [0, 3]}, "batch": {"micro": 1, "global": 3}}, "batch.global: 3 makes 3 micro batches, and parallel.vpp takes them in groups of pp=2; use 2 or 4"),
        ({"parallel": {"pp": 3, "layers_per_stage": "balanced"}}, "parallel.pp=3 is more stages than num_hidden_layers=2; use at most 2"),
        ({"parallel": {"pp": 2, "layers_per_stage": [1, 2]}}, "parallel.layers_per_stage=1,2: needs a number of at least 1 for each of the pp=2 stages, 2 together (num_hidden_layers), as in 1,1"),
        ({"parallel": {"pp": 2, "noop_layers": [0, 4]}}, "parallel.noop_layers=0,4: counts the 2 layers of the model and the noop layers together; use each number once, from 0 to 3"),
        ({"memory": {"recompute_layers": 2}}, "memory.recompute_layers: is about whole layers; set recompute: full too"),
        ({"memory": {"recompute": "full", "recompute_layers": 99}}, "memory.recompute_layers=99: a pipeline chunk has at most 2 layers; use at most 2"),
        ({"memory": {"recompute_norm": 2}, "parallel": {"pp": 2}}, "memory.recompute_norm=2: a pipeline chunk has at most 1 layer; use at most 1, or true"),
        ({"memory": {"recompute": "full", "recompute_per_rank": True}}, "memory.recompute_per_rank: is how recompute_layers counts; set that too, or leave it out"),
        ({"memory": {"recompute": "full", "recompute_layers": 1, "recompute_per_rank": True}}, "memory.recompute_per_rank: counts over the chunks of a stage, and vpp=1 makes one"),
        ({"parallel": {"delay_weight_gradients": True}}, "parallel.delay_weight_gradients: with pp=1 no stage waits for a gradient; leave it out, or set parallel.pp"),
        ({"parallel": {"pp": 2, "dp": 2, "delay_weight_gradients": True}, "optim": {"overlap_grad_reduce": True}}, "parallel.delay_weight_gradients: a sum of optim.overlap_grad_reduce begins before they are made; leave one of them out"),
        ({"parallel": {"pp": 2, "delay_weight_gradients": True}, "optim": {"fused_accumulation": False}}, "parallel.delay_weight_gradients: makes and adds them in one, which is optim.fused_accumulation; leave one of them out"),
        ({"parallel": {"pp": 2, "delay_weight_gradients": True}, "kernels": {"matmul": "reference"}}, "parallel.delay_weight_gradients: is of the products of CPUs and NPUs; leave it out, and kernels.matmul at auto"),
        ({"parallel": {"etp": 1}}, "parallel.etp=1: the model has no experts; leave it out"),
        ({"parallel": {"ep": 2}}, "parallel.ep=2: the model has no experts; use 1"),
        ({"model": MIXTRAL, "parallel": {"ep": 3}}, "parallel.ep=3 does not divide the 4 experts of a layer; use 1 or 2 or 4"),
        ({"model": MIXTRAL, "parallel": {"ep": 3}, "batch": {"global": 12}}, "parallel.ep=3 does not divide the 4 experts of a layer; use 1 or 2 or 4"),
        ({"model": {**MIXTRAL, "intermediate_size": 9}, "parallel": {"tp": 2, "sp": True}}, "parallel.tp=2 does not divide the width of an expert, 9; use 1 or 3 or 9"),
        ({"parallel": {"pp": 2, "delay_weight_gradients": True}, "kernels": {"grouped_matmul": "reference"}}, "parallel.delay_weight_gradients: is of the products of CPUs and NPUs; leave it out, and kernels.grouped_matmul at auto"),
        ({"lora": {"rank": 4}}, "lora: this version cannot do that yet; leave it out"),
        ({"checkpoint": {"asynchronous": True}}, "checkpoint.asynchronous: this version cannot do that yet; leave it out"),
        ({"checkpoint": {"folder": "WHERE/tokenizer/tokenizer.json"}}, "checkpoint.folder=WHERE/tokenizer/tokenizer.json: WHERE/tokenizer/tokenizer.json is a file; name a folder"),
        ({"train": {"stepz": 3}}, "train.stepz: no such key; did you mean steps?"),
        ({"optim": {"lr": "fast"}}, 'optim.lr: must be a number, not "fast"'),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_told_in_one_line(
    sections: dict[str, Any], line: str, where: Path, tmp_path: Path
) -> None:
    recipe = runs.values(where, tmp_path / "run")
    for name, section in sections.items():
        if not isinstance(section, dict) or "preset" in section:
            recipe[name] = section
        else:
            recipe[name] = {**(recipe.get(name) or {}), **section}
            recipe[name] = {key: value for key, value in recipe[name].items() if value is not GONE}
    recipe = {name: section for name, section in recipe.items() if section is not GONE}
    recipe = json.loads(json.dumps(recipe).replace("WHERE", str(where)))
    parallel = recipe.get("parallel", {})
    world = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", parallel.get("ep", 1))
    told = _told(recipe, tmp_path, "pretrain", [], world)
    assert len(told) == 1
    assert told[0].startswith(line.replace("WHERE", str(where)))
    assert not (tmp_path / "run").exists()


def test_faults_of_all_kinds_are_told_at_once(where: Path, tmp_path: Path) -> None:
    recipe = runs.values(where, tmp_path / "run", data={"train": str(where / "gone"), "valid": str(where / "chat")})
    overrides = ["parallel.tp=4", "parallel.pp=3", "batch.micro=3"]
    told = _told(recipe, tmp_path, "pretrain", overrides, 12)
    assert [line.split(":")[0].removeprefix(str(where)) for line in told] == [
        "batch.global",
        "parallel.tp=4 does not divide num_key_value_heads=2; use 1 or 2",
        "parallel.pp=3 is more stages than num_hidden_layers=2; use at most 2",
        "/gone",
        "/chat",
    ]


def test_fine_tuning_has_rules_of_its_own(where: Path, tmp_path: Path) -> None:
    recipe = runs.values(
        where, tmp_path / "run", "sft", data={"train": {str(where / "chat"): 1, str(where / "chat_valid"): 0}}
    )
    (told,) = _told(recipe, tmp_path, "sft", [], 1)
    assert told.startswith("data.train: every weight of a blend must be above 0: {")
    recipe = runs.values(where, tmp_path / "run", "sft", data={"valid": None, "split": "9,1"})
    assert _told(recipe, tmp_path, "sft", [], 1) == [
        "data.split: is for pretraining text; write a validation set of its own and name it as data.valid"
    ]
    recipe = runs.values(where, tmp_path / "run", "sft", data={"train": str(where / "text")})
    assert "this is text; train on it with pretrain" in _told(recipe, tmp_path, "sft", [], 1)[0]


def test_the_ranks_of_a_launcher_must_form_the_mesh(where: Path, tmp_path: Path) -> None:
    recipe = runs.values(where, tmp_path / "run", parallel={"tp": 2})
    assert _told(recipe, tmp_path, "pretrain", [], 3)[0].startswith(
        "parallel: tp=2 x pp=1 x cp=1 = 2 ranks hold one copy"
    )


def test_a_good_recipe_passes_and_leaves_nothing_behind(where: Path, tmp_path: Path) -> None:
    for task in ("pretrain", "sft"):
        recipe = Recipe.model_validate(runs.values(where, tmp_path / "run", task, parallel={"tp": 2, "dp": 2}))
        check(recipe, TASKS[task], world_size=4)
    assert not (tmp_path / "run").exists()


def test_sections_have_the_defaults_of_the_documentation() -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"preset": "qwen3-0.6b"},
            "data": {"train": "p"},
            "batch": {"global": 8},
            "train": {"steps": 1},
            "checkpoint": {"folder": "runs/a"},
        }
    )
    assert (recipe.precision, recipe.device, recipe.batch.micro, recipe.checkpoint.keep) == ("fp32", "auto", 1, 2)
    assert (recipe.optim.schedule, recipe.optim.clip_grad, recipe.optim.weight_decay) == ("cosine", 1.0, 0.1)
