"""Training runs small enough for a test: data, recipes, and the function that runs one on some ranks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.harness import run_ranks
from tests.tiny import tiny_tokenizer

VOCABULARY = 331  # above the 326 ids of the tokenizer, and no tp > 1 divides it into equal shares without padding
SIZES: dict[str, Any] = {
    "preset": "llama2-7b",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}

# Adam divides a gradient by its own size, so that the rounding of one that is nearly zero would move its weight as far as any
# other. With this eps a weight moves by what its gradient is worth, and weights agree as gradients do.
EPS = 1e-3


def material(folder: Path) -> Path:
    """Write a tokenizer, text (`text`, `valid`) and instructions (`chat`, `chat_valid`) into a folder and return it."""
    tiny_tokenizer(folder / "tokenizer")
    text(folder / "text", 40, seed=0)
    text(folder / "valid", 6, seed=1)
    chat(folder / "chat", 50, seed=2)
    chat(folder / "chat_valid", 5, seed=3)
    return folder


def text(prefix: Path, documents: int, *, seed: int) -> None:
    """Write documents of random lengths in which each id tends to follow another, so that there is something to learn."""
    from mindspeed_data.indexed import IndexedWriter, path_of, publish

    random = np.random.RandomState(seed)
    writer = IndexedWriter(f"{prefix}_text_document")
    for _ in range(documents):
        ids = _ids(random, random.randint(20, 200))
        writer.add(ids, np.array([len(ids)]))
    writer.finish()
    beside = path_of(prefix, ".note")
    Path(f"{beside}.tmp").touch()
    publish(writer, beside=beside)


def chat(prefix: Path, samples: int, *, seed: int) -> None:
    """Write instructions of very different lengths."""
    from mindspeed_data.indexed import IndexedWriter, path_of, publish
    from mindspeed_data.sidecar import INSTRUCTION

    random = np.random.RandomState(seed)
    writers = {name: IndexedWriter(f"{prefix}{suffix}") for name, suffix in INSTRUCTION.items()}
    for _ in range(samples):
        ids = _ids(random, random.randint(4, 60))
        labels = ids.copy()
        labels[: random.randint(1, len(ids) - 1)] = -100
        for name, values in (("input_ids", ids), ("labels", labels), ("attention_mask", np.ones_like(ids))):
            writers[name].add(values, np.array([len(ids)]))
    for writer in writers.values():
        writer.finish()
    beside = path_of(prefix, ".note")
    Path(f"{beside}.tmp").touch()
    publish(*writers.values(), beside=beside)


def _ids(random: np.random.RandomState, length: int) -> np.ndarray:
    ids = np.empty(length, np.int32)
    ids[0] = random.randint(320)
    for i in range(1, length):
        ids[i] = (ids[i - 1] * 7 + 3) % 320 if random.rand() < 0.7 else random.randint(320)
    return ids


def values(where: Path, run: Path, task: str = "pretrain", **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe on that material as plain values; sections are merged into it."""
    data = {"pretrain": ("text", "valid"), "sft": ("chat", "chat_valid")}[task]
    recipe: dict[str, Any] = {
        "model": SIZES,
        "data": {
            "tokenizer": str(where / "tokenizer"),
            "train": str(where / data[0]),
            "valid": str(where / data[1]),
            "seq_length": 32,
        },
        "batch": {"micro": 2, "global": 8},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup": 2},
        "train": {"steps": 10},
        "checkpoint": {"folder": str(run)},
        "log": {"tensorboard": False},
        "device": "cpu",
    }
    for name, section in sections.items():
        recipe[name] = {**recipe[name], **section} if isinstance(recipe.get(name), dict) else section
    return recipe


def train(
    recipe: dict[str, Any], task: str = "pretrain", *, world: int = 1, timeout: float = 120
) -> list[dict[str, Any]]:
    """Run a recipe on some ranks; return the lines of its metrics.jsonl."""
    run_ranks(trains, world, recipe, task, timeout=timeout)
    return metrics(Path(recipe["checkpoint"]["folder"]))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trains(recipe: dict[str, Any], task: str) -> None:
    """One rank of a run: what `mindspeed-train` does after its checks."""
    from mindspeed_train.config import Recipe
    from mindspeed_train.tasks import TASKS
    from mindspeed_train.trainer import Trainer

    trainer = Trainer(Recipe.model_validate(recipe), TASKS[task])
    trainer.train()
    trainer.close()


def stop(recipe: dict[str, Any], task: str = "pretrain", *, world: int = 1) -> None:
    """Run a recipe until its first checkpoint is saved, and no further."""
    run_ranks(stops, world, recipe, task, timeout=120)


def stops(recipe: dict[str, Any], task: str) -> None:
    from mindspeed_train.config import Recipe
    from mindspeed_train.tasks import TASKS
    from mindspeed_train.trainer import Trainer

    class Saved(Exception):  # noqa: N818
        pass

    class Stopping(Trainer):
        def save(self) -> Path:
            super().save()
            raise Saved

    trainer = Stopping(Recipe.model_validate(recipe), TASKS[task])
    with contextlib.suppress(Saved):
        trainer.train()
    trainer.close()


def stored(step: Path) -> dict[str, Any]:
    """Return every tensor of a checkpoint, whole."""
    import torch

    from mindspeed_core.checkpoint.torch_dist import read_box, read_metadata

    tensors = {}
    for key, tensor in read_metadata(step).items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for box in tensor.boxes:
            place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))
            whole[place] = read_box(step, box)
        tensors[key] = whole
    return tensors
