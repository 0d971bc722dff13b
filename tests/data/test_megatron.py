"""Our files in megatron-core itself: the bytes of its builder, and training on them with nothing of ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_core.tokenizer import Tokenizer
from tests.data.command import data
from tests.harness import run_ranks
from tests.tiny import tiny_tokenizer


def texts(path: Path) -> list[str]:
    """The documents of a file of the real data that have any text."""
    if path.suffix == ".txt":
        found = [path.read_text(encoding="utf-8")]
    else:
        found = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [text for text in found if text.strip()]


def built(prefix: Path, documents: list[list[int]]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in documents:
        builder.add_item(torch.IntTensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def assert_built_alike(ours: Path, tmp_path: Path, documents: list[list[int]]) -> None:
    built(tmp_path / "theirs", documents)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == Path(f"{ours}_text_document{suffix}").read_bytes()


def test_our_files_are_those_of_megatrons_builder(megatron: None, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    rows = [{"text": "the quick é 中文 🙂 " * (1 + i % 9)} for i in range(50)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["pretrain", tmp_path / "in.jsonl", "--tokenizer", folder, "--append-eod", "--output", tmp_path / "x"]
    assert data(*command).returncode == 0
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos is not None
    assert_built_alike(tmp_path / "x", tmp_path, [[*tokenizer.encode(row["text"]), tokenizer.eos] for row in rows])


@pytest.mark.real_data
@pytest.mark.parametrize(
    "folder", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mistral_v1", "mistral_v3"))]
)
def test_every_real_file_has_the_bytes_of_megatrons_builder(
    megatron: None, shared_data: Path, tmp_path: Path, folder: str
) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / folder)
    for path in sorted((shared_data / "pretrain").iterdir()):
        documents = texts(path)
        rows = 1 if path.suffix == ".txt" else len(path.read_bytes().splitlines())
        output = tmp_path / path.stem
        command = ["pretrain", path, "--tokenizer", tokenizer.folder, "--output", output]
        run = data(*command)
        assert run.returncode == 0, run.stderr
        assert f"{len(documents):,} samples" in run.stderr
        left_out = Path(f"{output}_text_document.left_out.jsonl")
        named = left_out.read_text().splitlines() if left_out.exists() else []
        assert len(named) == rows - len(documents)  # each row is in the data or named
        assert_built_alike(output, tmp_path, [tokenizer.encode(text) for text in documents])


def test_our_files_train_in_megatrons_own_data_set(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "in.jsonl").write_text((json.dumps({"text": "the quick brown fox jumps over the dog"}) + "\n") * 60)
    command = ["pretrain", tmp_path / "in.jsonl", "--tokenizer", folder, "--append-eod", "--output", tmp_path / "x"]
    assert data(*command).returncode == 0
    (losses,) = run_ranks(_train, 1, f"{tmp_path}/x_text_document", Tokenizer.load(folder).vocab_size)
    assert losses[-1] < losses[0] / 2


def _train(prefix: str, vocabulary: int) -> list[float]:
    """A plain megatron-core model on a plain GPTDataset."""
    from mindspeed_core.device import Device
    from mindspeed_core.megatron import load

    load(Device.open("cpu"))
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    class PlainTokenizer:
        eod, vocab_size, unique_identifiers = 0, vocabulary, {"class": "plain"}

    settings: dict[str, Any] = {
        "random_seed": 1,
        "sequence_length": 16,
        "tokenizer": PlainTokenizer(),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": True,
        "blend_per_split": [([prefix], None), None, None],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset, _, _ = BlendedMegatronDatasetBuilder(
            GPTDataset, [160, 0, 0], lambda: True, GPTDatasetConfig(**settings)
        ).build()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=-(-vocabulary // 8) * 8, max_sequence_length=16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(20):
        rows = [dataset[step * 8 + i] for i in range(8)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        loss = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses
