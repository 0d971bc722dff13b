from pathlib import Path

import numpy as np
import pytest

from mindspeed_core.errors import InputError
from mindspeed_data.indexed import IndexedDataset, IndexedWriter, path_of, publish

GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX
    "0100000000000000 08"  # version 1, code 8: uint16
    "0300000000000000 0400000000000000"  # 3 sequences, 3 documents + 1
    "02000000 01000000 03000000"  # lengths
    "0000000000000000 0400000000000000 0600000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # documents
)
GOLDEN_BIN = bytes.fromhex("0100 0200 0300 ffff 0500 0600")


def write(prefix: Path, sequences: list[list[int]], dtype: type = np.int32) -> IndexedDataset:
    writer = IndexedWriter(prefix, dtype)
    for sequence in sequences:
        writer.add(np.array(sequence, dtype), np.array([len(sequence)]))
    writer.finish()
    beside = path_of(prefix, ".meta.json")
    Path(f"{beside}.tmp").write_text("{}")
    publish(writer, beside=beside)
    return IndexedDataset(prefix)


def test_the_bytes_of_a_pair_are_golden(tmp_path: Path) -> None:
    write(tmp_path / "a.b", [[1, 2], [3], [65535, 5, 6]], np.uint16)
    assert (tmp_path / "a.b.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "a.b.bin").read_bytes() == GOLDEN_BIN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx", "a.b.meta.json"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_megatron_reads_what_we_write(megatron: None, tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Megatron

    sequences = [[1, 2, 3], [], [4], list(range(100))]
    ours = write(tmp_path / "x", sequences, dtype)
    theirs = Megatron(str(tmp_path / "x"))
    assert len(theirs) == len(ours) == 4
    for i, sequence in enumerate(sequences):
        assert theirs[i].tolist() == ours[i].tolist() == sequence
        assert theirs[i].dtype == ours[i].dtype == dtype
    assert theirs.document_indices.tolist() == ours.documents.tolist() == [0, 1, 2, 3, 4]
    assert theirs.get(3, offset=5, length=7).tolist() == ours.part(3, 5, 12).tolist()


def test_what_megatron_writes_we_read_and_write_alike(megatron: None, tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    sequences = [[7, 8], [9], [10, 11, 12]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for sequence in sequences:
        builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    theirs = IndexedDataset(tmp_path / "theirs")
    assert [theirs[i].tolist() for i in range(3)] == sequences
    write(tmp_path / "ours", sequences)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_documents_of_several_sequences_are_read(megatron: None, tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1])
    builder.finalize(str(tmp_path / "x.idx"))
    data = IndexedDataset(tmp_path / "x")
    assert ([data[0].tolist(), data[1].tolist()], data.documents.tolist()) == ([[1, 2], [3]], [0, 2])


def test_nothing_has_a_final_name_before_it_is_published(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x")
    writer.add(np.array([1], np.int32), np.array([1]))
    writer.finish()
    assert not any(path.suffix in (".bin", ".idx") for path in tmp_path.iterdir())
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_many_blocks_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_data.indexed.BLOCK", 3)
    lengths = [1, 0, 4, 2, 2, 7, 1]
    data = write(tmp_path / "x", [[1] * length for length in lengths])
    assert data.lengths.tolist() == lengths
    assert data.offsets.tolist() == [0, 4, 4, 20, 28, 36, 64]
    assert data.documents.tolist() == list(range(8))


def test_what_is_no_data_set_is_said_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3]])
    idx, bin = tmp_path / "x.idx", tmp_path / "x.bin"
    whole = idx.read_bytes()
    for content, said in {
        b"": "not the index",
        b"something else entirely, of some length": "not the index",
        whole[:9] + b"\x02" + whole[10:]: "version 2",
        whole[:-3]: "cut off",
    }.items():
        idx.write_bytes(content)
        with pytest.raises(InputError, match=said):
            IndexedDataset(tmp_path / "x")
    idx.write_bytes(whole)
    bin.write_bytes(b"\0" * 11)
    with pytest.raises(InputError, match=r"x\.bin: cut off"):
        IndexedDataset(tmp_path / "x")
    bin.unlink()
    with pytest.raises(InputError, match=r"x\.bin: no such file"):
        IndexedDataset(tmp_path / "x")
