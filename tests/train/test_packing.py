"""Packed runs: documents and samples that share a sequence learn what they learn alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import sidecar
from mindspeed_data.fitting import best_fit
from mindspeed_data.indexed import IndexedDataset
from tests.data.command import data
from tests.harness import run_ranks
from tests.train import runs


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def model(where: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that has learned a little, so that what a token sees makes a difference."""
    run = tmp_path_factory.mktemp("learned")
    runs.train(runs.values(where, run, data={"seq_length": 64}))
    return {"path": str(run)}


def _values(where: Path, run: Path, task: str, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    sections["data"] = {"seq_length": 64, **sections.get("data", {})}
    return {**runs.values(where, run, task, **sections), "model": model}


def _preprocess(where: Path, output: Path, *options: object) -> Any:
    """The command on the conversations of `talk`."""
    files = [where / "talk.json", "--tokenizer", where / "tokenizer", "--output", output]
    return data("sft", *files, "--format", "sharegpt", "--template", "empty", *options)


@pytest.fixture(scope="session")
def talk(where: Path) -> Path:
    """Conversations of up to four turns, from the command: every answer ends with EOS, and some texts hold one inside."""
    words = ["the quick", "brown fox", "jumps over", "a lazy<|endoftext|>dog", "once upon a time", "there was"]
    rows: list[dict[str, Any]] = []
    for i in range(24):
        turns = [(words[(i + j) % 6], words[(i * j + 5) % 6]) for j in range(1 + i % 4)]
        messages = [
            ({"from": "human", "value": ask}, {"from": "gpt", "value": f"{answer}<|endoftext|>"})
            for ask, answer in turns
        ]
        rows.append({"conversations": [message for turn in messages for message in turn]})
    (where / "talk.json").write_text(json.dumps(rows))
    for name, options in (("talk", []), ("talk_packed", ["--pack", "--seq-length", 64])):
        run = _preprocess(where, where / name, *options)
        assert run.returncode == 0, run.stderr
    ids = IndexedDataset(sidecar.files_of(where / "talk")["input_ids"])
    eos = Tokenizer.load(where / "tokenizer").eos
    assert max(int((ids[i] == eos).sum()) for i in range(len(ids))) > 4, "EOS within samples is what this is about"
    assert int(ids.lengths.max()) <= 64, "none is cut or left out"
    assert len(best_fit(ids.lengths, 64)) < len(ids) / 1.5
    return where / "talk"


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("kind", ["single turns", "conversations"])
def test_packing_leaves_the_loss_of_fine_tuning_as_it_is(
    kind: str, micro: int, model: dict[str, Any], where: Path, talk: Path, tmp_path: Path
) -> None:
    valid = {"single turns": ["chat_valid", "chat_valid"], "conversations": ["talk", "talk", "talk_packed"]}[kind]
    found = []
    for pack, name in zip((False, True, True), valid, strict=False):
        # the loss of the weights the run starts from, over all of the validation data
        sections = {
            "batch": {"micro": micro, "global": 8},
            "train": {"steps": 1, "eval_every": 1},
            "data": {"pack": pack, "valid": str(where / name)},
        }
        run = tmp_path / f"{name}_{pack}"
        lines = runs.train(_values(where, run, "sft", model, **sections), "sft")
        found.append(next(line["valid_loss"] for line in lines if line["step"] == 0))
    assert found[1:] == pytest.approx(found[:1] * (len(found) - 1), rel=1e-6)


def test_a_packed_step_has_the_gradient_of_its_samples(model: dict[str, Any], where: Path, tmp_path: Path) -> None:
    """One step over the whole data set, packed and not: the same samples, so the same gradient."""
    from mindspeed_data.instruction import InstructionSamples

    samples = InstructionSamples(where / "chat", seq_length=64)
    sequences = len(best_fit(samples.lengths, 64))
    assert sequences < len(samples) / 1.5, "it has to pack something to prove something"
    lines = {}
    for pack, total in ((False, len(samples)), (True, sequences)):
        sections = {"batch": {"micro": 1, "global": total}, "train": {"steps": 1}, "data": {"pack": pack}}
        lines[pack] = runs.train(_values(where, tmp_path / str(pack), "sft", model, **sections), "sft")[0]
    assert lines[True]["tokens"] == lines[False]["tokens"]
    for name in ("loss", "grad_norm"):
        assert lines[True][name] == pytest.approx(lines[False][name], rel=1e-6), name


def test_documents_of_a_packed_sample_are_each_on_their_own(model: dict[str, Any], where: Path, tmp_path: Path) -> None:
    recipe = _values(where, tmp_path, "pretrain", model, data={"pack": True})
    (packed, apart, mixed) = run_ranks(_by_document, 1, recipe)[0]
    assert packed == pytest.approx(apart, rel=1e-6)
    assert mixed != pytest.approx(apart, rel=1e-4), "without segments the documents see each other"


def _by_document(recipe: dict[str, Any]) -> list[float]:
    """The loss of packed samples; of their documents, one a row; of the samples as one text each."""
    from mindspeed_data.batches import stack
    from mindspeed_train.config import Recipe
    from mindspeed_train.step import run_batch
    from mindspeed_train.tasks import TASKS
    from mindspeed_train.trainer import Trainer

    trainer = Trainer(Recipe.model_validate(recipe), TASKS["pretrain"])
    samples = [trainer.train_data[i] for i in range(6)]
    assert max(int(sample["segments"].max()) for sample in samples) >= 1
    documents = []
    for sample in samples:
        for number in range(int(sample["segments"].max()) + 1):
            own = sample["segments"] == number
            documents.append({name: sample[name][own] for name in ("tokens", "labels", "weights")})
    text = [{name: sample[name] for name in ("tokens", "labels", "weights")} for sample in samples]
    found = []
    for rows in ([stack(samples)], [stack([document]) for document in documents], [stack(text)]):
        losses = [run_batch(trainer.chunks, [one], trainer.mesh, trainer.task.forward, train=False) for one in rows]
        found.append(sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses))
    trainer.close()
    return found


def test_a_packed_run_resumes_where_it_stopped(where: Path, tmp_path: Path) -> None:
    straight = runs.train(runs.values(where, tmp_path / "one", "sft", data={"pack": True}, train={"steps": 4}), "sft")
    recipe = runs.values(
        where, tmp_path / "two", "sft", data={"pack": True}, train={"steps": 4}, checkpoint={"every": 2}
    )
    runs.stop(recipe, "sft")
    runs.train(recipe, "sft")
    assert [line["loss"] for line in runs.metrics(tmp_path / "two")] == [line["loss"] for line in straight]


def test_data_packed_on_the_disk_asks_for_its_recipe(where: Path, talk: Path, tmp_path: Path) -> None:
    from mindspeed_core.errors import InputError
    from mindspeed_train.config import Recipe
    from mindspeed_train.tasks import TASKS

    assert _preprocess(where, tmp_path / "talk", "--pack", "--seq-length", 48).returncode == 0
    for sections, said in [
        ({"seq_length": 48}, r"data\.pack: .* holds packed sequences; set data\.pack: true"),
        ({"seq_length": 64, "pack": True}, r"data\.seq_length: .*; set data\.seq_length: 48"),
    ]:
        values = runs.values(where, tmp_path / "run", "sft", data={"train": str(tmp_path / "talk"), **sections})
        with pytest.raises(InputError, match=said):
            TASKS["sft"].check(Recipe.model_validate(values))
    values = runs.values(
        where, tmp_path / "run", "sft", data={"train": str(tmp_path / "talk"), "seq_length": 48, "pack": True}
    )
    TASKS["sft"].check(Recipe.model_validate(values))
