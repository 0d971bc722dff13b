import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import journal, readers, sidecar
from mindspeed_data.indexed import IndexedDataset
from mindspeed_data.sources import find
from tests.data.command import data
from tests.tiny import tiny_tokenizer

ALPACA = [
    {"instruction": "Say hi", "input": "", "output": "hi"},
    {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief."},
    {"instruction": "And 3?", "input": None, "output": "6", "history": [["Add", "ok"], ["1 and 2", "3"]]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def lines(path: Path, count: int) -> Path:
    words = ("the quick", "brown fox", "jumps é", "over 中文", "lazy\tdog", "🙂")
    rows = [{"text": " ".join(words[(i * j) % 6] for j in range(1, 3 + i % 40))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_text_becomes_one_sequence_per_document(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the lazy dog")
    (tmp_path / "b.jsonl").write_text('{"text": "fox"}\n{"text": " "}\n')
    run = data("pretrain", tmp_path, "--tokenizer", tokenizer, "--output", tmp_path / "new/x", "--append-eod")
    assert (run.returncode, run.stdout) == (0, f"{tmp_path}/new/x\n"), run.stderr
    loaded = Tokenizer.load(tokenizer)
    written = IndexedDataset(tmp_path / "new/x_text_document")
    assert [written[i].tolist() for i in range(2)] == [[*loaded.encode(t), loaded.eos] for t in ("the lazy dog", "fox")]
    known = sidecar.read(tmp_path / "new/x")
    assert known is not None
    assert (known.kept, known.left_out, known.fingerprint) == (2, {"empty text": 1}, loaded.fingerprint)
    assert f"{tmp_path}/b.jsonl:2: empty text" in run.stderr
    ends = ("bin", "idx", "left_out.jsonl", "meta.json", "origin.bin", "origin.idx")
    assert leftovers(tmp_path / "new") == [f"x_text_document.{end}" for end in ends]
    assert [json.loads(line) for line in (tmp_path / "new/x_text_document.left_out.jsonl").open()] == [
        {"file": f"{tmp_path}/b.jsonl", "line": 2, "reason": "empty text"}
    ]
    for name, told in known.files.items():
        content = (tmp_path / "new" / name).read_bytes()
        assert told == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_a_data_set_among_the_input_is_not_read(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n{\n')
    (tmp_path / "my.meta.json").write_text('{"text": "not of a data set"}')
    for inputs in ([tmp_path], [tmp_path / "*.json*"]):
        command = ["pretrain", *inputs, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--overwrite"]
        for _ in range(2):
            assert data(*command).returncode == 0
            known = sidecar.read(tmp_path / "out")
            assert known is not None
            assert [Path(file["path"]).name for file in known.inputs] == ["a.jsonl", "my.meta.json"]
    run = data("pretrain", tmp_path / "out_*.json", *command[2:])
    assert "no file matches this pattern" in run.stderr


def test_every_bad_row_of_text_is_counted_and_named_with_its_line(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "ROW_LIMIT", 1 << 20)
    monkeypatch.setattr(readers, "CHUNK", 1 << 16)
    bad = [
        (b'{"text": "a"', "not valid JSON: expecting ',' delimiter, column 13"),
        (b"[1]", "not a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff"),
        (b'{"title": "a"}', "no key text"),
        (b'{"text": 3}', "text is a number, not a text"),
        (b'{"text": null}', "empty text"),
        (b'{"text": " \\n"}', "empty text"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair, not text"),
        (b'{"text": "' + b"a" * (1 << 20) + b'"}', "longer than 1 MiB"),
    ]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([b'{"text": "the fox"}', *(row for row, _ in bad), b'{"text": "the dog"}']))
    command = ["pretrain", source, "--tokenizer", tokenizer]
    run = data(*command, "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    named = [json.loads(line) for line in (tmp_path / "x_text_document.left_out.jsonl").open()]
    assert [(row["file"], row["line"]) for row in named] == [(str(source), 2 + i) for i in range(len(bad))]
    for row, (_, said) in zip(named, bad, strict=True):
        assert row["reason"].startswith(said)
    known = sidecar.read(tmp_path / "x")
    assert known is not None
    assert (known.kept, sum(known.left_out.values())) == (2, len(bad))
    strict = data(*command, "--output", tmp_path / "y", "--strict")
    assert (strict.returncode, strict.stderr.splitlines()[-1]) == (2, f"error: {source}:2: {named[0]['reason']}")
    assert not list(tmp_path.glob("y*"))


def test_bos_eod_and_uint16(tokenizer: Path, tmp_path: Path) -> None:
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    folder = tmp_path / "with_bos"
    folder.mkdir()
    (folder / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|im_start|>"}))
    (tmp_path / "a.txt").write_text("a\nb\n")
    options = ["--bos", "--eod-token", "<|im_end|>", "--dtype", "uint16", "--per-line"]
    run = data("pretrain", tmp_path / "a.txt", "--tokenizer", folder, "--output", tmp_path / "x", *options)
    assert run.returncode == 0, run.stderr
    written, loaded = IndexedDataset(tmp_path / "x_text_document"), Tokenizer.load(folder)
    assert written.dtype == np.uint16
    assert [loaded.decode(written[i].tolist(), skip_special=False) for i in range(2)] == [
        "<|im_start|>a<|im_end|>",
        "<|im_start|>b<|im_end|>",
    ]


@pytest.mark.parametrize(("kind", "copied"), [("text", True), ("text", False), ("alpaca", True)])
def test_any_number_of_workers_writes_the_same_bytes(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, copied: bool
) -> None:
    from mindspeed_core.templates import TEMPLATES
    from mindspeed_data import formats, pool, preprocess
    from mindspeed_data.conversations import CONVERSATIONS
    from mindspeed_data.tokenize import InstructionJob, TextJob

    monkeypatch.setattr(pool, "FORK", copied and pool.FORK)
    alpaca = CONVERSATIONS["alpaca"]
    if kind == "text":
        source = lines(tmp_path / "in.jsonl", 3000)
    else:
        source = tmp_path / "in.json"
        source.write_text(json.dumps(ALPACA * 700))
    monkeypatch.setattr(readers, "CHUNK", 20_000)  # many chunks, of which some hold faults
    source.write_text(source.read_text().replace('"3"}', '""}', 1))
    sources, loaded = find([source]), Tokenizer.load(tokenizer)
    written = []
    for workers in (1, 3):
        output = tmp_path / f"{workers}" / "x"
        common = {"sources": sources, "tokenizer": loaded, "fast": False}
        if kind == "text":
            job = TextJob(**common, format=formats.TEXT, keys=formats.TEXT.keys, dtype=np.dtype("int32"), eod=0)
        else:
            job = InstructionJob(**common, format=alpaca, keys=alpaca.keys, template=TEMPLATES["chatml"])
        preprocess.run(job, output, workers=workers)
        written.append({path.name: path.read_bytes() for path in output.parent.iterdir()})
    assert written[0].keys() == written[1].keys()
    for name in written[0]:
        assert written[0][name] == written[1][name], name


def test_alpaca_rows_are_learned_from_where_the_answer_starts(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(ALPACA))
    options = ["--template", "chatml", "--tokenizer", tokenizer]
    run = data("sft", tmp_path / "in.json", *options, "--output", tmp_path / "x")
    assert (run.returncode, run.stdout) == (0, f"{tmp_path}/x\n"), run.stderr
    loaded = Tokenizer.load(tokenizer)
    files = ("input_ids", "labels", "attention_mask")
    ids, labels, mask = (IndexedDataset(f"{tmp_path}/x{sidecar.INSTRUCTION[name]}") for name in files)
    seen = []
    for i in range(len(ids)):
        learned = labels[i] != -100
        assert (labels[i][learned] == ids[i][learned]).all()
        assert (mask[i] == 1).all()
        text, open_ = "", False
        for id, is_learned in zip(ids[i].tolist(), learned.tolist(), strict=True):
            text += {(False, True): "«", (True, False): "»"}.get((open_, is_learned), "")
            text += loaded.decode([id], skip_special=False)
            open_ = is_learned
        seen.append(f"{text}»")
    user, bot, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
    assert seen == [
        f"{user}Say hi{end}\n{bot}«hi{end}»",
        f"<|im_start|>system\nBe brief.{end}\n{user}Add\n1 and 2{end}\n{bot}«3{end}»",
        f"{user}Add{end}\n{bot}«ok{end}»\n{user}1 and 2{end}\n{bot}«3{end}»\n{user}And 3?{end}\n{bot}«6{end}»",
    ]
    shown = data("show", tmp_path / "x")
    assert seen[2] in shown.stdout
    assert "sample 0 of 3" in shown.stdout
    verified = data("verify", tmp_path / "x")
    assert (verified.returncode, verified.stdout.startswith(f"{tmp_path}/x: sound; 3 samples")) == (0, True)


def test_samples_up_to_the_sequence_length_stay(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"q": "a" * n, "a": "b"} for n in (1, 2, 3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = json.dumps({"prompt": "q", "response": "a"})
    options = ["--tokenizer", tokenizer, "--template", "empty", "--map-keys", keys, "--output", tmp_path / "x"]
    run = data("sft", tmp_path / "in.jsonl", *options, "--seq-length", 3)
    assert run.returncode == 0, run.stderr
    lengths = IndexedDataset(f"{tmp_path}/x_packed_labels_document").lengths
    assert lengths.tolist() == [2, 3]
    assert "1 longer than 3 tokens" in run.stderr


@pytest.mark.parametrize(
    ("name", "content", "command", "said"),
    [
        ("x.jsonl", '{"body": "1", "id": 2}', "pretrain", "x.jsonl:1: no key 'text'; the row has body, id; name the"),
        ("x.jsonl", '{"text": "1"}', "sft", "x.jsonl:1: no key 'instruction'; the row has text; this looks like text"),
        ("x.txt", "some text", "sft", "x.txt: a text holds no questions and answers; use mindspeed-data pretrain"),
        ("x.json", json.dumps(ALPACA), "pretrain", "no key 'text'; the row has instruction, input, output; this looks"),
        ("x.txt", "", "pretrain", "x.txt: this file is empty"),
        ("x.txt", b"caf\xe9", "pretrain", "x.txt:1: not UTF-8: byte 0xe9"),
        ("x.jsonl", '{"text": ""}\n{"text": 3}\n{', "pretrain", "nothing is left of the input"),
        ("x.jsonl", '{"text": "\\ud800"}', "pretrain", "half of a surrogate pair"),
        ("x.json", '[{"instruction": "a", "output": ""}]', "sft", "x.json:1: empty answer"),
        ("x.json", '[{"instruction": "", "output": "a"}]', "sft", "x.json:1: empty question"),
        ("x.json", '[{"instruction": "a", "output": "b", "history": "c"}]', "sft", "history is not a list of"),
    ],
)
def test_unusable_input_is_said_and_nothing_is_written(
    tokenizer: Path, tmp_path: Path, name: str, content: str | bytes, command: str, said: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    template = ["--template", "chatml"] if command == "sft" else []
    output = tmp_path / "new/x"
    run = data(command, tmp_path / name, "--tokenizer", tokenizer, "--output", output, *template)
    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert all(line.startswith(("error: ", "tokenizing")) for line in run.stderr.splitlines())
    assert leftovers(tmp_path / "new") == []
    assert run.stdout == ""


ASKED = [{"role": "user", "content": "a"}]
SAID = [*ASKED, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("command", "row", "said"),
    [
        (["sft"], {"conversations": SHARED}, "add --format sharegpt"),
        (["sft", "--format", "openai"], {"conversations": SHARED}, "add --format sharegpt"),
        (["sft"], {"messages": SAID}, "add --format openai"),
        (["sft", "--format", "sharegpt"], {"instruction": "a", "output": "b"}, "add --format alpaca"),
        (["sft"], {"instruction": "a", "chosen": "b", "rejected": "c"}, "mindspeed-data pairwise --format alpaca"),
        (
            ["sft"],
            {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": SHARED[1]},
            "mindspeed-data pairwise --format sharegpt",
        ),
        (["pairwise"], {"messages": ASKED, "chosen": SAID[1], "rejected": SAID[1]}, "add --format openai"),
        (["pairwise"], {"messages": SAID, "label": True}, "mindspeed-data sft --format openai"),
        (["prm"], {"input": "a ки", "label": "a +"}, "add --format math-shepherd"),
        (["prm"], {"prompt": "a", "completions": ["b"], "labels": [True]}, "add --format stepwise"),
        (["pretrain"], {"messages": SAID}, "mindspeed-data sft --format openai"),
        (["sft"], {"question": "a", "answer": "b"}, '--map-keys \'{"prompt": "KEY"}\''),
        (["sft", "--map-keys", '{"prompt": "q"}'], {"instruction": "a", "output": "b"}, '{"prompt": "KEY"}'),
        (["sft", "--format", "sharegpt"], {"conversations": SAID, "text": "a"}, "message without from"),
        (["sft", "--format", "sharegpt"], {"messages": SHARED}, '{"messages": "KEY"}'),
    ],
)
def test_rows_of_another_format_are_recognised(
    tokenizer: Path, tmp_path: Path, command: list[str], row: dict[str, object], said: str
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    options = {"pretrain": [], "prm": ["--placeholder", "@"]}.get(command[0], ["--template", "chatml"])
    run = data(*command, tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "x", *options)
    assert (run.returncode, said in run.stderr) == (2, True), run.stderr


def test_wrong_options_are_said(tokenizer: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", 3)
    (tmp_path / "bare").mkdir()
    output = ["--output", tmp_path / "x"]
    ok = ["pretrain", source, "--tokenizer", tokenizer]
    assert data(*ok, *output).returncode == 0
    before = leftovers(tmp_path)
    for arguments, said in [
        (["pretrain", tmp_path / "no.txt", "--tokenizer", tokenizer, *output], "no.txt: no such file or folder"),
        (["pretrain", source, "--tokenizer", tmp_path / "no", *output], "no: no such folder"),
        (["pretrain", source, "--tokenizer", tmp_path / "bare", *output], "bare: holds no tokenizer"),
        ([*ok, *output], "x_text_document.idx: exists already; choose another --output, or replace it"),
        ([*ok, "--output", tmp_path], f"{tmp_path}: --output is the beginning of file names, not a folder"),
        ([*ok, "--output", source / "x"], "cannot be made a folder, a file is in the way"),
        ([*ok, *output, "--eod-token", "<eod>"], "'<eod>' is not one of its tokens"),
        ([*ok, *output, "--bos"], "has no BOS token"),
        ([*ok, *output, "--map-keys", "{"], "--map-keys: not valid JSON"),
        ([*ok, *output, "--map-keys", '{"txt": "a"}'], "--map-keys: format text has no txt; it has text"),
        ([*ok, *output, "--json-key", "a", "--map-keys", '{"text": "b"}'], "--json-key a: beside --map-keys"),
        ([*ok, *output, "--per-line"], "--per-line: is of txt alone, and none of the inputs is one"),
        (
            ["sft", source, "--tokenizer", tokenizer, "--template", "chatml", "--longer", "cut", *output],
            "--longer cut: longer than what is missing; add --seq-length",
        ),
        ([*ok, *output, "--dtype", "int8"], "int8"),
        (["sft", source, "--tokenizer", tokenizer, *output], "brings no chat template; choose one of"),
        (["sft", source, "--tokenizer", tokenizer, "--template", "x", *output], "no template is called x"),
        (
            ["sft", source, "--tokenizer", tokenizer, "--format", "belle", *output],
            "'--format': 'belle' is not one of 'alpaca'",
        ),
        (["show", tmp_path / "none"], "no data set of that prefix"),
        (["verify", tmp_path / "none"], "no data set of that prefix"),
        (["show", tmp_path / "x", "--start", "3"], "holds 3 samples"),
    ]:
        run = data(*arguments)
        assert (run.returncode, "Traceback" in run.stderr) == (2, False), run.stderr
        assert said in run.stderr
        assert len(run.stderr.splitlines()) == 1
    assert leftovers(tmp_path) == before
    assert data(*ok, *output, "--overwrite").returncode == 0


def test_verify_finds_what_was_changed(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(ALPACA))
    data("sft", tmp_path / "in.json", "--tokenizer", tokenizer, "--template", "chatml", "--output", tmp_path / "x")
    labels = tmp_path / "x_packed_labels_document.bin"
    ids = np.fromfile(labels, np.int32)
    learned = np.flatnonzero(ids != -100)
    for change, said in [
        ((learned[0], 7), "sample 0 has a label that is not the id"),
        ((None, 5), "bytes, its index asks"),
    ]:
        changed = ids.copy()
        if change[0] is None:
            changed = np.append(changed, np.int32(1))
        else:
            changed[change[0]] = change[1]
        changed.tofile(labels)
        run = data("verify", tmp_path / "x")
        assert run.returncode == 2
        assert said in run.stderr
    ids.tofile(labels)
    described = tmp_path / "x_packed.meta.json"
    described.write_text(described.read_text().replace("xxh3_128", "sha256"))
    assert "an older version wrote it" in data("verify", tmp_path / "x").stderr


def test_a_data_set_of_the_other_kind_is_told_apart(tokenizer: Path, tmp_path: Path) -> None:
    from mindspeed_core.errors import InputError

    (tmp_path / "in.json").write_text(json.dumps(ALPACA))
    options = ["--tokenizer", tokenizer, "--output"]
    assert data("sft", tmp_path / "in.json", "--template", "empty", *options, tmp_path / "s").returncode == 0
    assert data("pretrain", lines(tmp_path / "t.jsonl", 3), *options, tmp_path / "t").returncode == 0
    for name in ("t", "t_text_document", "t_text_document.idx"):
        assert sidecar.text_prefix(tmp_path / name) == tmp_path / "t_text_document"
        assert list(sidecar.files_of(tmp_path / name)) == ["text"]
    for name in ("s", "s_packed", "s_packed_input_ids_document", "s_packed_labels_document.bin"):
        assert sidecar.instruction_prefix(tmp_path / name) == tmp_path / "s"
        assert list(sidecar.files_of(tmp_path / name)) == list(sidecar.INSTRUCTION)
    with pytest.raises(InputError, match="this is instruction data; train on it with sft"):
        sidecar.text_prefix(tmp_path / "s")
    with pytest.raises(InputError, match="this is text; train on it with pretrain"):
        sidecar.instruction_prefix(tmp_path / "t")
    run = data("pretrain", tmp_path / "t.jsonl", *options, tmp_path / "s", "--overwrite")
    assert (run.returncode, "s_packed_input_ids_document.idx: another kind of data has this prefix" in run.stderr) == (
        2,
        True,
    )
    run = data("sft", tmp_path / "in.json", "--template", "empty", *options, tmp_path / "t")
    assert (run.returncode, "t_text_document.idx: another kind of data has this prefix" in run.stderr) == (2, True)
    other = Tokenizer.load(tiny_tokenizer(tmp_path / "other", size=300))
    for name in ("s", "t"):
        sidecar.check_tokenizer(tmp_path / name, Tokenizer.load(tokenizer))
        with pytest.raises(InputError, match="was made with another tokenizer"):
            sidecar.check_tokenizer(tmp_path / name, other)
    for path in tmp_path.glob("*.meta.json"):
        path.unlink()
    small = Tokenizer.load(tiny_tokenizer(tmp_path / "small", size=100))
    for name in ("s", "t"):
        sidecar.check_tokenizer(tmp_path / name, Tokenizer.load(tokenizer))
    (tmp_path / "t_text_document.bin").write_bytes(
        b"\xff\xff\0\0" * IndexedDataset(tmp_path / "t_text_document").tokens
    )
    with pytest.raises(InputError, match="holds the id 65535, beyond"):
        sidecar.check_tokenizer(tmp_path / "t", small)


def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(tokenizer: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", 5000)
    with open(source, "a") as file:
        for _ in range(120):
            file.write(json.dumps({"text": "the quick brown fox " * 20_000}) + "\n")
    command = ["pretrain", source, "--tokenizer", tokenizer, "--workers", "2", "--output"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mindspeed_data", *map(str, command), str(tmp_path / "new/x")],
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "new/x_text_document.journal.tmp"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted after [\d,]+ samples; the same command goes on from there", said.splitlines()[-1])
    assert all(name.endswith((".tmp", ".npz")) for name in leftovers(tmp_path / "new"))
    again = data(*command, tmp_path / "new/x")
    assert "going on behind the " in again.stderr
    assert data(*command, tmp_path / "straight/x").returncode == again.returncode == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}


def test_workers_end_with_their_parent(tokenizer: Path, tmp_path: Path) -> None:
    program = """
import os, time
from mindspeed_data.pool import Pool
from tests.data.test_preprocess import Sleep
pool = Pool(Sleep(), 2)
for worker in pool._workers:
    print(worker.pid, flush=True)
for pid in pool.map([0, 0]):
    pass
print("ready", flush=True)
os.kill(os.getpid(), 9)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    pids = [int(line) for line in run.stdout.split()[:2]]
    assert "ready" in run.stdout, run.stderr
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class Sleep:
    """Work that sleeps, for pools."""

    def start(self) -> Callable[[float], None]:
        return time.sleep


class Fail:
    """Work that fails as it is told to."""

    def start(self) -> Callable[[str], str]:
        return self.work

    def work(self, item: str) -> str:
        from mindspeed_core.errors import InputError

        if item == "input":
            raise InputError("a bad file")
        if item == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "bug":
            raise KeyError("x")
        return item


@pytest.mark.parametrize(
    ("item", "kind", "said"),
    [
        ("input", "InputError", "a bad file"),
        ("killed", "InputError", "a worker was killed"),
        ("bug", "RuntimeError", "KeyError: 'x'"),
    ],
)
@pytest.mark.parametrize("copied", [True, False])
def test_an_error_in_a_worker_reaches_the_parent(
    item: str, kind: str, said: str, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindspeed_data import pool
    from mindspeed_data.pool import Pool

    if copied and not pool.FORK:
        pytest.skip("workers are not copies here")
    monkeypatch.setattr(pool, "FORK", copied)
    with Pool(Fail(), 2) as pool, pytest.raises(Exception, match=said) as caught:
        list(pool.map(["a", "b", item, "c"]))
    assert type(caught.value).__name__ == kind


def test_a_worker_lets_go_of_what_it_does_not_need(tmp_path: Path) -> None:
    """A lock of the parent ends with the parent, not with the last of its workers."""
    import fcntl

    from mindspeed_data.pool import Pool

    def opened() -> int:
        return os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)

    held, other = opened(), opened()
    fcntl.flock(held, fcntl.LOCK_EX)
    with Pool(Fail(), 2) as pool:
        assert list(pool.map(["a", "b"])) == ["a", "b"]
        os.close(held)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_as_many_workers_as_cores_and_input_are_worth(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_data import formats, preprocess
    from mindspeed_data.sources import Source
    from mindspeed_data.tokenize import TextJob

    monkeypatch.setattr(preprocess.os, "sched_getaffinity", lambda _: range(3), raising=False)
    for size, fast, asked, expected in [
        (100 << 20, True, None, 1),
        (128 << 20, True, None, 2),
        (100 << 20, False, None, 3),
        (1, False, None, 1),
        (1, True, 4, 1),
        (100 << 20, True, 4, 4),
        (256 << 20, True, None, 2),  # one of three cores is left to the process that writes
        (256 << 20, False, None, 3),
    ]:
        job = TextJob(
            sources=[Source(Path("x.jsonl"), "jsonl", size)],
            tokenizer=Tokenizer.load(tokenizer),
            format=formats.TEXT,
            keys=formats.TEXT.keys,
            fast=fast,
        )
        assert preprocess._workers(job, asked) == expected


def test_results_come_in_order_and_items_are_taken_as_needed() -> None:
    from mindspeed_data.pool import AHEAD, Pool

    taken = []

    def items() -> Iterator[str]:
        for i in range(40):
            taken.append(i)
            yield str(i)

    with Pool(Fail(), 3) as pool:
        for n, result in enumerate(pool.map(items())):
            assert result == str(n)
            assert len(taken) <= n + 1 + 3 * AHEAD


@pytest.mark.parametrize("change", ["shrinks", "grows", "is written to"])
@pytest.mark.parametrize("late", [False, True])
def test_input_that_changes_under_a_run_is_said(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, late: bool
) -> None:
    from mindspeed_data import preprocess

    monkeypatch.setattr(readers, "CHUNK", 20_000)
    source = lines(tmp_path / "in.jsonl", 2000)
    size = source.stat().st_size

    def changes() -> None:
        with open(source, "r+b") as file:
            if change == "is written to":
                file.write(b"{")
                os.utime(source, ns=(1, 1))
            else:
                file.truncate(size // 2 if change == "shrinks" else size + 1)

    tell = preprocess._Places.tell

    def told(places: preprocess._Places, chunk: readers.Chunk, *rest: Any) -> Any:
        if (chunk.pieces[-1].stop == size) == late:
            changes()
        return tell(places, chunk, *rest)

    monkeypatch.setattr(preprocess._Places, "tell", told)
    run = data("pretrain", source, "--tokenizer", tokenizer, "--output", tmp_path / "new/x")
    assert (run.returncode, run.stderr.splitlines()[-1]) == (
        2,
        f"error: {source}: changed while it was read; run again when nothing writes to it any more",
    )
    assert leftovers(tmp_path / "new") == []


@pytest.mark.parametrize("batch", [10, 2000])
def test_an_arrow_file_that_shrinks_under_a_run_is_said(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    import pyarrow

    from mindspeed_data import preprocess

    monkeypatch.setattr(readers, "CHUNK", 20_000)
    source = tmp_path / "in.arrow"
    table = pyarrow.table({"text": ["the quick brown fox " * 20] * 2000})
    with pyarrow.ipc.new_stream(str(source), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    tell = preprocess._Places.tell

    def told(*arguments: Any) -> Any:
        os.truncate(source, 5000)
        return tell(*arguments)

    monkeypatch.setattr(preprocess._Places, "tell", told)
    run = data("pretrain", source, "--tokenizer", tokenizer, "--output", tmp_path / "new/x", "--workers", 1)
    assert (run.returncode, f"{source}: changed while it was read" in run.stderr) == (2, True), run.stderr
    assert leftovers(tmp_path / "new") == []


@pytest.mark.parametrize("gone", ["in.jsonl", "new"])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_vanishes_under_a_run_is_one_line(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str, workers: int
) -> None:
    from mindspeed_data import preprocess

    monkeypatch.setattr(readers, "CHUNK", 20_000)
    source = lines(tmp_path / "in.jsonl", 2000)
    tell = preprocess._Places.tell

    def told(*arguments: Any) -> Any:
        path = tmp_path / gone
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        return tell(*arguments)

    monkeypatch.setattr(preprocess._Places, "tell", told)
    command = ["pretrain", source, "--tokenizer", tokenizer, "--workers", workers]
    run = data(*command, "--output", tmp_path / "new/x")
    assert (run.returncode, "Traceback" in run.stderr) == (2, False), run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: {tmp_path / gone}")
    assert all(name.endswith((".tmp", ".npz")) for name in leftovers(tmp_path / "new"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_place_that_takes_no_files_is_one_line(tokenizer: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", 3000)
    run = data("pretrain", source, "--tokenizer", tokenizer, "--output", "/proc/x")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(
        "error: /proc/x_text_document.journal.tmp: no such file or directory; it"
    )
    command = f"{sys.executable} -m mindspeed_data pretrain {source} --tokenizer {tokenizer} --output {tmp_path}/new/x"
    limited = subprocess.run(["bash", "-c", f"ulimit -f 8; exec {command}"], capture_output=True, text=True)
    assert limited.returncode == 2, limited.stderr
    assert limited.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/new/x_text_document.")
    assert "bin.tmp: file too large; raise the limit of the size of files (ulimit -f)" in limited.stderr
    assert leftovers(tmp_path / "new") == []


def test_names_that_are_not_utf8_are_refused_at_once(tokenizer: Path, tmp_path: Path) -> None:
    bad = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"\xff.jsonl"))
    try:
        shutil.copy(lines(tmp_path / "in.jsonl", 3), bad)
    except OSError:
        pytest.skip("this file system takes no such names")
    said = f"error: {tmp_path}/in\\xff.jsonl: this name is not UTF-8; rename it, or choose another\n"
    for inputs, output in (([bad], "x"), ([tmp_path], "x"), ([tmp_path / "in.jsonl"], bad.name)):
        run = data("pretrain", *inputs, "--tokenizer", tokenizer, "--output", tmp_path / "new" / output)
        assert (run.returncode, run.stderr.replace("/new/", "/")) == (2, said)
        assert not (tmp_path / "new").exists()


def test_files_of_which_nothing_is_kept_are_told(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    (folder / "b.jsonl").write_text('{"prompt": "x"}\n' * 20 + "{\n[]\n")
    (folder / "c.json").write_text("[]")
    (folder / "d.csv").write_text("instruction,output\n")
    command = [folder, "--template", "chatml", "--tokenizer", tokenizer, "--output"]
    run = data("sft", *command, tmp_path / "x")
    assert run.returncode == 0, run.stderr
    said = f"{folder}/b.jsonl: nothing of it was kept: 20 no key instruction, 1 not valid JSON, 1 not a JSON object"
    empty = [f"{folder}/{name}: holds no rows; leave it out" for name in ("c.json", "d.csv")]
    assert [line for line in run.stderr.splitlines() if line in (said, *empty)] == [said, *empty]
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).unlink()
    for number in range(10):
        (folder / f"e{number}.jsonl").write_text("\n")
    assert "\nerror: and nothing of 2 more files\n" in data("sft", *command, tmp_path / "y").stderr
    for path in folder.glob("e*"):
        path.unlink()
    run = data("sft", *command, tmp_path / "y")
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert (run.returncode, lines) == (2, [f"error: {line}" for line in ("nothing is left of the input", *empty)])


def test_reasons_are_counted_without_their_details(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n\na,1\nb\nc,1,2\nd\xe9,1\ne\xff,1\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\n{"text": 1 2}\n{"text": "\xfe"}\n')
    run = data("pretrain", tmp_path, "--tokenizer", tokenizer, "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    known = sidecar.read(tmp_path / "x")
    assert known is not None
    assert known.left_out == {"not UTF-8": 3, "not valid JSON": 2, "other fields than the columns": 2}
    assert "b.jsonl:1: not valid JSON: unterminated string, column 10" in run.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_csv_that_is_utf16_is_said(tokenizer: Path, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_text("text\nthe fox\n", encoding=encoding)
    run = data("pretrain", tmp_path / "a.csv", "--tokenizer", tokenizer, "--output", tmp_path / "x")
    assert (run.returncode, "not UTF-8" in run.stderr, "\0" in run.stderr) == (2, True, False)
    assert run.stderr.startswith(f"error: {tmp_path}/a.csv:1: ")


def test_a_run_counts_what_it_reads_itself(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK", 20_000)
    source = lines(tmp_path / "in.jsonl", 3000)
    size = source.stat().st_size
    command = ["pretrain", source, "--tokenizer", tokenizer, "--workers", 1, "--output"]
    for number in (1, 2, 3):
        run = data(*command, tmp_path / "x", "--shard", f"{number}/3")
        part = size * number // 3 - size * (number - 1) // 3
        assert f"tokenizing: {part / 1000:.0f}/{part / 1000:.0f} KB, " in run.stderr
        assert f"1 file, {part / 1e6:.1f} of {size / 1e6:.1f} MB: " in run.stderr
    with monkeypatch.context() as patch:
        add = journal.Journal.add

        def dies(held: journal.Journal, line: dict[str, Any], files: Any) -> None:
            add(held, line, files)
            if line["read"] > size / 2:
                raise KeyboardInterrupt

        patch.setattr(journal.Journal, "add", dies)
        assert data(*command, tmp_path / "y").returncode == 130
    read = json.loads((tmp_path / "y_text_document.journal.tmp").read_text().splitlines()[-1])["read"]
    run = data(*command, tmp_path / "y")
    left = size - read
    assert f"tokenizing: {left / 1000:.0f}/{left / 1000:.0f} KB, " in run.stderr
    assert f"1 file, {left / 1e6:.1f} of {size / 1e6:.1f} MB: 3,000 samples" in run.stderr
    monkeypatch.undo()
    assert f"1 file, {size / 1e6:.1f} MB: 3,000 samples" in data(*command, tmp_path / "z").stderr


@pytest.mark.parametrize("name", ["bin", "lengths", "idx"])
def test_a_full_disk_is_one_line_and_half_a_file_never_has_a_name(tokenizer: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "new").mkdir()
    full = tmp_path / f"new/x_text_document.{name}.tmp"
    full.symlink_to("/dev/full")
    source = lines(tmp_path / "in.jsonl", 3000)
    command = ["pretrain", source, "--tokenizer", tokenizer, "--output"]
    run = data(*command, tmp_path / "new/x")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == (
        f"error: {full}: no space left on device; free some space or choose another folder"
    )
    assert "Traceback" not in run.stderr
    assert all(path.endswith(".tmp") for path in leftovers(tmp_path / "new"))
    assert bool(leftovers(tmp_path / "new")) == (name == "idx")  # what was done before is kept
    full.unlink(missing_ok=True)
    assert data(*command, tmp_path / "new/x").returncode == data(*command, tmp_path / "y").returncode == 0
    assert (tmp_path / "new/x_text_document.bin").read_bytes() == (tmp_path / "y_text_document.bin").read_bytes()


@pytest.mark.real_data
@pytest.mark.parametrize(
    "folder", ["tokenizers/qwen3", "tokenizers/gpt2", "tokenizers/mistral_v1", "models/stories260k_hf"]
)
def test_real_text_gets_the_ids_of_the_plain_tokenizer(shared_data: Path, tmp_path: Path, folder: str) -> None:
    files = [shared_data / "pretrain" / name for name in ("c4_demo.jsonl", "zh_tang_poetry.jsonl")]
    run = data("pretrain", *files, "--tokenizer", shared_data / folder, "--output", tmp_path / "x", "--workers", "2")
    assert run.returncode == 0, run.stderr
    loaded, written = Tokenizer.load(shared_data / folder), IndexedDataset(tmp_path / "x_text_document")
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    assert len(written) == len(texts)
    for i in range(0, len(texts), 50):
        assert written[i].tolist() == loaded.encode(texts[i])
