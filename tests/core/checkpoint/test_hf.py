"""Safetensors: read lazily, written as a stream, byte for byte what the library writes."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mindspeed_core.checkpoint import open_checkpoint
from mindspeed_core.checkpoint.hf import INDEX, Header, HFTensors, ShardPlan, write_hf, write_safetensors
from mindspeed_core.errors import InputError
from tests.tiny_checkpoint import contents, hf_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_a_streamed_file_is_the_one_that_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("x")
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in wanted.items()}
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    stored = HFTensors([folder / "a.safetensors"])
    write_safetensors(folder / "b.safetensors", Header.of(stored, stored.names()), stored)
    assert (folder / "b.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()


def test_a_folder_of_several_files_comes_back_byte_for_byte(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "a", shard="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    write_hf(open_checkpoint(source), tmp_path / "b")
    assert contents(tmp_path / "b") == contents(source)


def test_our_own_cut_is_by_size_and_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = hf_folder(tmp_path / "a")
    checkpoint = open_checkpoint(source)
    plan = ShardPlan.choose(checkpoint.tensors, limit=10_000)
    assert len(plan.files) > 2
    target = tmp_path / "b"
    write_hf(checkpoint, target)
    (target / "model.safetensors").unlink()
    for name, header in plan.files.items():
        write_safetensors(target / name, header, checkpoint.tensors)
    assert plan.index is not None
    (target / INDEX).write_text(plan.index)
    theirs = AutoModelForCausalLM.from_pretrained(target).state_dict()
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(theirs[name], tensor)
    assert sum((target / name).stat().st_size for name in plan.files) > json.loads(plan.index)["metadata"]["total_size"]


def test_another_dtype_is_written_into_the_configuration(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "a")
    write_hf(open_checkpoint(source).cast(torch.bfloat16), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in load_file(tmp_path / "b" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(source / "model.safetensors")[name].bfloat16())


def test_buffers_and_a_stored_tied_output_layer_come_back_too(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "a", tied=True)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "made": "by hand"})
    checkpoint = open_checkpoint(source)
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & set(checkpoint.tensors.names())
    write_hf(checkpoint, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(source)


def _edit(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def _cut(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _cut_in_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _huge_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def _drop(source: Path, name: str) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, source / "model.safetensors")


def _add(source: Path, name: str) -> None:
    save_file({**load_file(source / "model.safetensors"), name: torch.zeros(1)}, source / "model.safetensors")


def _no_weights(source: Path, other: str | None = None) -> None:
    (source / "model.safetensors").unlink()
    if other:
        (source / other).touch()


def _index(source: Path, value: Any) -> None:
    (source / INDEX).write_text(value if isinstance(value, str) else json.dumps(value))


def _untied_head(source: Path) -> None:
    _edit(source, tie_word_embeddings=True)


BAD = {
    "no configuration": (lambda s: (s / "config.json").unlink(), r"config\.json: no such file"),
    "configuration is not JSON": (lambda s: (s / "config.json").write_text("{"), r"config\.json: is not valid JSON"),
    "configuration is a list": (lambda s: (s / "config.json").write_text("[]"), r"config\.json: holds list"),
    "unknown architecture": (lambda s: _edit(s, architectures=["MambaForCausalLM"]), r"MambaForCausalLM.*LlamaForCausalLM"),
    "no architecture": (lambda s: _edit(s, architectures=None), r"architectures=\[\]"),
    "file cut in its data": (_cut, r"model\.safetensors: has \d+ bytes where its header says \d+"),
    "file cut in its header": (_cut_in_header, r"model\.safetensors: is cut"),
    "file with a huge header": (_huge_header, r"model\.safetensors: is cut"),
    "empty file": (lambda s: (s / "model.safetensors").write_bytes(b""), r"model\.safetensors: is cut"),
    "not safetensors": (lambda s: (s / "model.safetensors").write_bytes(b"x" * 999), r"model\.safetensors: is cut"),
    "tensor missing": (lambda s: _drop(s, "model.norm.weight"), r"model\.norm\.weight missing"),
    "head missing": (lambda s: _drop(s, "lm_head.weight"), r"lm_head\.weight missing.*tie_word_embeddings"),
    "tensor unknown": (lambda s: _add(s, "model.visual.weight"), r"safetensors: holds model\.visual\.weight"),
    "more layers than stored": (lambda s: _edit(s, num_hidden_layers=9), r"model\.layers\.4\..* and 44 more missing"),
    "fewer layers than stored": (lambda s: _edit(s, num_hidden_layers=1), r"holds model\.layers\.1\."),
    "another shape": (lambda s: _edit(s, vocab_size=38), r"embed_tokens\.weight has shape \(37, 16\) where .* \(38, 16\)"),
    "tied but different": (_untied_head, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
    "no weights": (_no_weights, r"holds no \*\.safetensors"),
    "weights of another format": (lambda s: _no_weights(s, "pytorch_model.bin"), r"holds pytorch_model\.bin"),
    "one of three files": (lambda s: (s / "model.safetensors").rename(s / "model-00001-of-00003.safetensors"), r"1 of the 3"),
    "index is not JSON": (lambda s: _index(s, "{"), r"index\.json: is not valid JSON"),
    "index is empty": (lambda s: _index(s, {}), r"index\.json: has no weight_map"),
    "index names a missing file": (lambda s: _index(s, {"weight_map": {"a": "b.safetensors"}}), r"b\.safetensors, which is missing"),
    "index leads outside": (lambda s: _index(s, {"weight_map": {"a": "../b.safetensors"}}), r"outside the folder"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_folder_is_refused_in_words(tmp_path: Path, fault: str) -> None:
    source = hf_folder(tmp_path / "a")
    spoil, message = BAD[fault]
    spoil(source)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(source)
    assert "\n" not in str(error.value)


def test_a_path_that_is_no_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, message in (
        ("nowhere", "no such folder"),
        ("file", "is a file"),
        ("empty", "holds no checkpoint"),
        ("run", "no checkpoint yet"),
    ):
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path / path)


def test_a_configuration_may_stand_elsewhere(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "a")
    (tmp_path / "c").mkdir()
    (source / "config.json").rename(tmp_path / "c" / "config.json")
    checkpoint = open_checkpoint(source, config=tmp_path / "c")
    assert checkpoint.architecture.num_layers == 4
    assert replace(checkpoint).assets == tmp_path / "c"
