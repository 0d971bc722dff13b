"""Rows of conversations: what becomes of them, and why some become nothing."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_core.templates import TEMPLATES
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import sidecar
from mindspeed_data.conversations import CONVERSATIONS, Conversation
from mindspeed_data.pairwise import PAIRS
from mindspeed_data.process_reward import Marks, process_rewards
from tests.data.command import data, written
from tests.letters import Letters
from tests.tiny import tiny_tokenizer

CALL = {"name": "search", "arguments": {"q": "fox"}}
TOOL = {"name": "search", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), more=("<reserved_106>", "<reserved_107>"))


def read(format: str, record: dict[str, Any], **keys: str) -> Conversation:
    chosen = CONVERSATIONS[format]
    return chosen.read(record, chosen.mapped(keys))


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def test_the_three_formats_say_the_same() -> None:
    alpaca = {"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"]]}
    sharegpt = {"conversations": [turn("human", "a"), turn("gpt", "b"), turn("human", "c\nd"), turn("gpt", "e")]}
    openai = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    openai += [{"role": "user", "content": "c\nd"}, {"role": "assistant", "content": "e"}]
    expected = Conversation(tuple(openai), "s")
    assert read("alpaca", alpaca) == expected
    assert read("sharegpt", {**sharegpt, "system": "s"}) == expected
    assert read("sharegpt", {"conversations": [turn("system", "s"), *sharegpt["conversations"]]}) == expected
    assert read("openai", {"messages": [{"role": "system", "content": "s"}, *openai]}) == expected
    mapped = {"turns": [{"who": "me", "text": "a"}, {"who": "it", "text": "b"}]}
    names = {"messages": "turns", "role_tag": "who", "content_tag": "text", "user_tag": "me", "assistant_tag": "it"}
    assert read("sharegpt", mapped, **names) == Conversation(tuple(openai[:2]))


def test_calls_and_tools_are_the_same_in_both_formats() -> None:
    sharegpt = {
        "conversations": [
            turn("human", "a"),
            turn("function_call", json.dumps(CALL)),
            turn("observation", ""),
            turn("gpt", "b"),
        ],
        "tools": json.dumps([TOOL]),
    }
    openai = {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": '{"q": "fox"}'}}],
            },
            {"role": "tool", "content": "", "tool_call_id": "1"},
            {"role": "assistant", "content": "b"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    found = read("sharegpt", sharegpt)
    assert found == read("openai", openai)
    assert found.tools == (TOOL,)
    assert found.messages[1] == {"role": "function", "content": "", "calls": [CALL]}
    several = turn("function_call", "<think>hm</think>" + json.dumps([CALL, CALL]))
    assert read("sharegpt", {"conversations": [turn("human", "a"), several]}).messages[1] == {
        "role": "function",
        "content": "<think>hm</think>",
        "calls": [CALL, CALL],
    }


def test_messages_of_openai_lose_nothing() -> None:
    """Neither what was thought before an answer, nor a call as it was written when a message had but one."""
    legacy = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "function_call": {"name": "search", "arguments": '{"q": "fox"}'},
        },
        {"role": "function", "name": "search", "content": "o"},
        {"role": "assistant", "content": "b", "reasoning_content": "so", "tool_calls": None},
    ]
    assert read("openai", {"messages": legacy}).messages == (
        {"role": "user", "content": "a"},
        {"role": "function", "content": "", "thought": "hm", "calls": [CALL]},
        {"role": "observation", "content": "o"},
        {"role": "assistant", "content": "b", "thought": "so"},
    )
    named = [{**legacy[3], "reasoning": "so"}]
    del named[0]["reasoning_content"]
    found = read("openai", {"messages": [*legacy[:3], *named]}, thought_tag="reasoning")
    assert [message.get("thought") for message in found.messages] == [None, None, None, "so"]
    system = {"role": "system", "content": "s"}
    assert read("openai", {"messages": [system, *legacy], "system": "s"}).system == "s"


BAD = [  # what a row holds, and why it is left out
    ("alpaca", {"instruction": " ", "input": "", "output": "b"}, "empty question"),
    ("alpaca", {"instruction": "a", "output": ""}, "empty answer"),
    ("alpaca", {"instruction": "a", "output": ["b"]}, "output is a list, not a text"),
    ("alpaca", {"instruction": "a"}, "no key output"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "history is not a list of [question, answer]"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a", ""]]}, "empty text in history"),
    ("sharegpt", {"turns": []}, "no key conversations"),
    ("sharegpt", {"conversations": []}, "a conversation without a question"),
    ("sharegpt", {"conversations": "a"}, "conversations is a text, not a list"),
    ("sharegpt", {"conversations": ["a"]}, "not an object: message 1 is a text"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "a message without value: message 1"),
    ("sharegpt", {"conversations": [turn("human", "a")]}, "no answer to the last question"),
    ("sharegpt", {"conversations": [turn("human", "a"), turn("gpt", " ")]}, "empty answer: message 2"),
    ("sharegpt", {"conversations": [turn("human", ""), turn("gpt", "b")]}, "empty question: message 1"),
    (
        "sharegpt",
        {"conversations": [turn("gpt", "a"), turn("human", "b")]},
        "wrong role: message 1 is from assistant, not from user",
    ),
    (
        "sharegpt",
        {"conversations": [turn("system", "s"), turn("human", "a"), turn("human", "b")]},
        "wrong role: message 3 is from user, not from assistant or function",
    ),
    (
        "sharegpt",
        {"conversations": [turn("user", "a"), turn("gpt", "b")]},
        "unknown role: message 1 is from 'user', not from system, human, gpt, observation, function_call",
    ),
    (
        "sharegpt",
        {"conversations": [turn("human", "a"), turn("function_call", "{")]},
        "a function call that is not JSON: message 2",
    ),
    (
        "sharegpt",
        {"conversations": [turn("human", "a"), turn("function_call", '{"name": "x"}')]},
        "a function call without name and arguments: message 2",
    ),
    (
        "sharegpt",
        {"conversations": [turn("human", "a"), turn("function_call", '{"name": "x", "arguments": 3}')]},
        "a function call whose arguments are no object: message 2",
    ),
    ("sharegpt", {"conversations": [turn("human", "a"), turn("gpt", "b")], "tools": "{"}, "tools is not JSON"),
    (
        "sharegpt",
        {"conversations": [turn("human", "a"), turn("gpt", "b")], "tools": "[{}]"},
        "tools: a tool without a name",
    ),
    ("openai", {"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "content is a list, not a text"),
    (
        "openai",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": "x"}]}]},
        "a function call without name and arguments: message 2",
    ),
    (
        "openai",
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
        "wrong role: message 1 calls functions and is from user",
    ),
    (
        "openai",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "function_call": "x"}]},
        "a function call without name and arguments: message 2",
    ),
    (
        "openai",
        {"messages": [{"role": "assistant", "content": "b", "function_call": CALL, "tool_calls": [CALL]}]},
        "calls twice: message 1 has tool_calls and function_call",
    ),
    (
        "openai",
        {"messages": [{"role": "user", "content": "a", "reasoning_content": "hm"}]},
        "wrong role: message 1 has reasoning_content and is from user",
    ),
    (
        "openai",
        {"messages": [{"role": "assistant", "content": "b", "reasoning_content": ["hm"]}]},
        "reasoning_content is a list, not a text",
    ),
    (
        "openai",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "system": "t"},
        "two system texts: that of the conversation is not that of its first message",
    ),
    (
        "openai",
        {"messages": [{"role": "assistant", "tool_calls": True}]},
        "tool_calls is true or false, not a list: message 1",
    ),
]
NAMES = sorted({name for format in CONVERSATIONS.values() for name in format.keys.values()} | {"chosen", "rejected"})
NAMES += [
    "name",
    "arguments",
    "parameters",
    "properties",
    "function",
    "value",
    "completions",
    "labels",
    "label",
    "prompt",
]
GOOD = {
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [turn("human", "a"), turn("gpt", "b")]},
    "openai": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize("format", sorted(GOOD))
def test_every_bad_row_is_counted_and_named_with_its_line(tokenizer: Path, tmp_path: Path, format: str) -> None:
    bad = [(record, said) for name, record, said in BAD if name == format]
    source = tmp_path / "in.jsonl"
    rows = [GOOD[format], *(record for record, _ in bad), GOOD[format]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["sft", source, "--format", format, "--tokenizer", tokenizer, "--template", "chatml"]
    run = data(*command, "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    known = sidecar.read(tmp_path / "x")
    assert known is not None
    assert (known.kept, sum(known.left_out.values())) == (2, len(bad))
    for number, (_, said) in enumerate(bad, 2):
        assert said.split(":")[0] in known.left_out
        if number - 2 < 10:  # only the first are named
            assert f"{source}:{number}: {said}\n" in run.stderr
    strict = data(*command, "--output", tmp_path / "y", "--strict")
    assert (strict.returncode, strict.stderr.splitlines()[-1]) == (2, f"error: {source}:2: {bad[0][1]}")
    assert not list(tmp_path.glob("y*"))


def test_all_turns_are_written_and_learned_as_asked(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"conversations": [turn("human", "a"), turn("gpt", "b"), turn("human", "c"), turn("gpt", "d")], "system": "s"},
        {
            "conversations": [
                turn("human", "a"),
                turn("function_call", json.dumps(CALL)),
                turn("observation", "o"),
                turn("gpt", "d"),
            ],
            "tools": [],
        },
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    loaded = Tokenizer.load(tokenizer)
    command = ["sft", tmp_path / "in.json", "--format", "sharegpt", "--tokenizer", tokenizer, "--overwrite"]
    start, end = "<|im_start|>", "<|im_end|>"
    first = [
        f"{start}user\na{end}\n{start}assistant\n",
        f"b{end}",
        f"\n{start}user\nc{end}\n{start}assistant\n",
        f"d{end}",
    ]
    call = f"Action: search\nAction Input: {json.dumps(CALL['arguments'])}{end}"
    for learn, form in (("answers", "{}[[{}]]{}[[{}]]"), ("last", "{}{}{}[[{}]]"), ("all", "[[{}{}{}{}]]")):
        run = data(*command, "--template", "chatml", "--learn", learn, "--output", tmp_path / "x")
        assert run.returncode == 0, run.stderr
        system = f"{start}system\ns{end}\n"
        expected = [
            form.format(system + first[0], *first[1:]),
            form.format(first[0], call, f"\n{start}tool\no{end}\n{start}assistant\n", first[3]),
        ]  # the first token of a sample follows nothing that it could be learned from
        assert written(tmp_path / "x", loaded) == [text.replace(f"[[{start}", f"{start}[[") for text in expected]
        known = sidecar.read(tmp_path / "x")
        assert known is not None
        assert (known.learn, known.template, known.end) == (learn, "chatml", None)


def test_answers_of_several_tools_stand_in_a_row_or_are_named(tokenizer: Path, tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("one", "two")]
    asked = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    end = {"role": "assistant", "content": "b"}
    pair = {"messages": asked, "chosen": end, "rejected": {"role": "assistant", "content": "c"}}
    row = {"messages": [*asked, end]}
    for name, rows in (("sft", [row, {"messages": [*asked, asked[0], end]}]), ("pairwise", [pair, pair])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    command = ["--format", "openai", "--tokenizer", tokenizer, "--overwrite"]
    run = data("sft", tmp_path / "sft.jsonl", *command, "--template", "chatml", "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    assert (
        "sft.jsonl:2: wrong role: message 5 is from user, not from assistant or function or observation" in run.stderr
    )
    start, end = "<|im_start|>", "<|im_end|>"
    question = (
        f"{start}user\na{end}\n{start}assistant\n{{}}Action: one\nAction Input: {{{{}}}}\nAction: two\nAction Input: {{{{}}}}{end}"
        f"{{}}\n{start}tool\n1{end}\n{start}tool\n2{end}\n{start}assistant\n"
    )
    assert written(tmp_path / "x", Tokenizer.load(tokenizer)) == [question.format("[[", "]]") + f"[[b{end}]]"]
    run = data("pairwise", tmp_path / "pairwise.jsonl", *command, "--template", "chatml", "--output", tmp_path / "y")
    assert run.returncode == 0, run.stderr
    for which, answer in (("chosen_", "b"), ("rejected_", "c")):
        expected = [question.format("", "") + f"[[{answer}{end}]]"] * 2
        assert written(tmp_path / "y", Tokenizer.load(tokenizer), which) == expected
    run = data("sft", tmp_path / "sft.jsonl", *command, "--template", "default", "--output", tmp_path / "x")
    assert (run.returncode, "1 template default writes one answer of a tool at a time" in run.stderr) == (2, True)


def test_answers_end_with_what_follows_them_where_eos_is_efficient(tokenizer: Path, tmp_path: Path) -> None:
    row = {"conversations": [turn("human", "a"), turn("gpt", "b"), turn("human", "c"), turn("gpt", "d")]}
    (tmp_path / "in.json").write_text(json.dumps([row]))
    command = ["sft", tmp_path / "in.json", "--format", "sharegpt", "--tokenizer", tokenizer]
    run = data(*command, "--template", "baichuan2", "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    (text,) = written(tmp_path / "x", Tokenizer.load(tokenizer))
    eos = "<|endoftext|>"
    assert text == f"<reserved_106>a<reserved_107>[[b]](<reserved_106>={eos})c<reserved_107>[[d{eos}]]"
    assert data("verify", tmp_path / "x").returncode == 0
    assert f"«<reserved_106>→{eos}»" in data("show", tmp_path / "x").stdout


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        ("trl", ["--append-eod"], "a[[b<|endoftext|>]]"),  # a template that ends nothing
        ("default", ["--append-eod"], "Human: a\nAssistant:[[b<|endoftext|>]]"),  # its own end is not doubled
        (
            "chatml",
            ["--append-eod"],
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|><|endoftext|>]]",
        ),
        (
            "qwen3",
            ["--eod-token", "<|im_end|>"],
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[b<|im_end|>\n]]",
        ),
        ("baichuan2", ["--append-eod", "--learn", "last"], "<reserved_106>a<reserved_107>[[b<|endoftext|>]]"),
    ],
)
def test_a_token_ends_every_conversation_that_does_not_end_with_it(
    tokenizer: Path, tmp_path: Path, template: str, options: list[str], expected: str
) -> None:
    (tmp_path / "in.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    command = ["sft", tmp_path / "in.json", "--tokenizer", tokenizer, "--template", template]
    run = data(*command, *options, "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    assert written(tmp_path / "x", Tokenizer.load(tokenizer)) == [expected]
    assert data("verify", tmp_path / "x").returncode == 0
    shown = data("show", tmp_path / "x").stdout.splitlines()
    assert f"«{expected.split('[[')[1].removesuffix(']]')}»" in "\n".join(shown)
    run = data(*command, "--eod-token", "<|no|>", "--output", tmp_path / "y")
    assert (run.returncode, "'<|no|>' is not one of its tokens" in run.stderr) == (2, True)


def test_thoughts_are_kept_learned_or_dropped(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "<think>hm</think>b"},
        {"instruction": "a", "output": "b"},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    loaded = Tokenizer.load(tokenizer)
    question, empty = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    thought, plain = "<think>hm</think>b<|im_end|>\n", "b<|im_end|>\n"
    for thinking, expected in {
        "keep": [f"{question}[[{thought}]]", f"{question}{empty}[[{plain}]]"],
        "learn": [f"{question}[[{thought}]]", f"{question}[[{empty}{plain}]]"],
        "drop": [f"{question}{empty}[[{plain}]]"] * 2,
    }.items():
        command = ["sft", tmp_path / "in.json", "--tokenizer", tokenizer, "--template", "qwen3", "--overwrite"]
        run = data(*command, "--thinking", thinking, "--output", tmp_path / "x")
        assert run.returncode == 0, run.stderr
        assert written(tmp_path / "x", loaded) == expected
    run = data(*command[:-3], "--template", "qwen", "--thinking", "drop", "--output", tmp_path / "y")
    assert (run.returncode, "template qwen marks no thoughts" in run.stderr) == (2, True)


def test_the_originals_key_map_is_understood(tokenizer: Path, tmp_path: Path) -> None:
    row = {"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "in.json").write_text(json.dumps([row]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    keys = json.dumps({"messages": "chat", "tags": tags})
    command = ["sft", tmp_path / "in.json", "--format", "sharegpt", "--tokenizer", tokenizer, "--template", "empty"]
    run = data(*command, "--map-keys", keys, "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    assert written(tmp_path / "x", Tokenizer.load(tokenizer)) == ["a[[b]]"]


TEXTS = st.sampled_from(
    ["", " ", "a", "{", "[]", "human", "gpt", "function_call", "tool", "+", "x ки", "\ud800", json.dumps(CALL)]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "b"]), inner, max_size=4),
    max_leaves=12,
)


WITH_TOOLS = {
    "conversations": [
        turn("human", "a"),
        turn("function_call", json.dumps(CALL)),
        turn("observation", "o"),
        turn("gpt", "b"),
    ],
    "tools": [{"name": "x", "parameters": {"properties": {"q": {"type": "string", "enum": ["a"]}}, "required": ["q"]}}],
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "o"},
        {"role": "tool", "content": "p"},
        {"role": "assistant", "content": "b"},
    ],
    "instruction": "a",
    "output": "b",
    "history": [["c", "d"]],
    "system": "s",
    "chosen": turn("gpt", "b"),
    "rejected": turn("gpt", "c"),
    "input": "x ки",
    "value": ["+"],
    "label": "x +",
    "prompt": "q",
    "completions": ["x"],
    "labels": [True],
}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object within a value, with each of its indices or keys."""
    if isinstance(value, list | dict):
        for key in range(len(value)) if isinstance(value, list) else list(value):
            yield value, key
            yield from places(value[key])


@given(st.data(), st.sampled_from(["qwen", "qwen3", "glm4_moe", "llama2"]))
@settings(max_examples=300, deadline=None)
def test_any_row_is_read_or_left_out_with_a_reason(draws: st.DataObject, template: str) -> None:
    """Whatever JSON stands anywhere in a row, it becomes a sample or a ValueError, and a sample ids or a ValueError."""
    record = draws.draw(st.dictionaries(st.sampled_from(NAMES), JSON) | st.builds(copy.deepcopy, st.just(WITH_TOOLS)))
    for _ in range(draws.draw(st.integers(0, 2)) if record else 0):
        holder, key = draws.draw(st.sampled_from(list(places(record))))
        holder[key] = draws.draw(JSON)
    for format in (*CONVERSATIONS.values(), *PAIRS.values(), *process_rewards(Marks()).values()):
        if format.missing(record, format.keys):
            continue
        with contextlib.suppress(ValueError):
            sample = format.read(record, format.keys)
            if isinstance(sample, Conversation):
                TEMPLATES[template].encode(Letters(), sample.messages, sample.system, sample.tools)
