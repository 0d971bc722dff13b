from pathlib import Path

import pytest

from mindspeed_core.errors import InputError
from mindspeed_core.templates import TEMPLATES, template
from mindspeed_core.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "think"},
    {"role": "user", "content": "And  more?"},
    {"role": "assistant", "content": "Yes."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
# Llama 3's own template, as far as system, user and assistant messages go.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WRITTEN = {  # the whole conversation, with [[what is learned]]
    "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[[think<|im_end|>]]\n<|im_start|>user\nAnd  more?<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST][[think</s>]]<s>[INST] And  more? [/INST][[Yes.</s>]]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[think<|eot_id|>]]<|start_header_id|>user"
    "<|end_header_id|>\n\nAnd  more?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Yes.<|eot_id|>]]",
    "alpaca": "Be brief.### Instruction:\nHi\n\n### Response:\n[[think</s>]]\n\n### Instruction:\nAnd  more?\n\n"
    "### Response:\n[[Yes.</s>]]",
    "empty": "Be brief.Hi[[think]]And  more?[[Yes.]]",
}
WRITTEN["chatml"] = WRITTEN["qwen"]


class Letters:
    """Stands for a tokenizer: one id per character, special tokens whole."""

    folder = Path("letters")
    bos, eos, specials = 1, 2, {"<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "<|eot_id|>": 5}

    def id_of(self, token: str) -> int | None:
        return self.specials.get(token)

    def encode(self, text: str) -> list[int]:
        for token, id in self.specials.items():
            text = text.replace(token, chr(id))
        return list(map(ord, text))

    def decode(self, ids: list[int]) -> str:
        names = {id: token for token, id in self.specials.items()}
        return "".join(names.get(i, chr(i)) for i in ids)


def joined(turns: list[tuple[list[int], list[int]]]) -> list[int]:
    return [i for source, target in turns for i in (*source, *target)]


@pytest.fixture(scope="module")
def qwen3(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers/qwen3")


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_conversation_is_written_as_the_original_writes_it(name: str) -> None:
    tokenizer = Letters()
    turns = TEMPLATES[name].encode(tokenizer, [SYSTEM, *TURNS])
    assert "".join(f"{tokenizer.decode(a)}[[{tokenizer.decode(b)}]]" for a, b in turns) == WRITTEN[name]
    prompt = tokenizer.decode(TEMPLATES[name].prompt(tokenizer, [SYSTEM, *TURNS[:3]]))
    assert prompt == WRITTEN[name].rsplit("[[", 1)[0].replace("[[", "").replace("]]", "")


def test_the_default_system_text_stands_where_none_is_given() -> None:
    tokenizer = Letters()
    for name in TEMPLATES:
        default = TEMPLATES[name].default_system
        written = tokenizer.decode(TEMPLATES[name].prompt(tokenizer, TURNS[:1]))
        assert (default or "Hi") in written
        assert (name in ("qwen", "alpaca")) == (default is not None)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["qwen", "chatml"])
@pytest.mark.parametrize("turns", [1, 3])
def test_prompts_equal_the_tokenizers_own_template(qwen3: Tokenizer, name: str, turns: int) -> None:
    for messages in [[SYSTEM, *TURNS[:turns]], *([TURNS[:turns]] if name == "chatml" else [])]:
        theirs = qwen3.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert TEMPLATES[name].prompt(qwen3, messages) == theirs
        assert template(None).prompt(qwen3, messages) == theirs


def test_llama3_equals_the_published_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path, eos="<|eot_id|>", chat_template=LLAMA3))
    object.__setattr__(tokenizer, "bos", tokenizer.id_of("<|endoftext|>"))
    tokenizer.hf.bos_token = "<|endoftext|>"
    for messages in (TURNS, [SYSTEM, *TURNS]):
        theirs = tokenizer.hf.apply_chat_template(messages, return_dict=False)
        for ours in (TEMPLATES["llama3"], template("tokenizer")):
            assert joined(ours.encode(tokenizer, messages)) == theirs
        theirs = tokenizer.hf.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert TEMPLATES["llama3"].prompt(tokenizer, messages[:-1]) == theirs
    assert TEMPLATES["llama3"].encode(tokenizer, TURNS) == template(None).encode(tokenizer, TURNS)


@pytest.mark.real_data
def test_the_tokenizers_own_template_learns_answers_and_their_end(qwen3: Tokenizer) -> None:
    turns = template(None).encode(qwen3, [SYSTEM, *TURNS])
    flat = joined(turns)
    theirs = qwen3.hf.apply_chat_template([SYSTEM, *TURNS], return_dict=False)
    assert theirs == [*flat, *qwen3.encode("\n")]
    # An answer "think" is not found inside the <think> tags that Qwen3 writes before its last answer.
    assert [qwen3.decode(b, skip_special=False) for _, b in turns] == [
        "think<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    single = template(None).encode(qwen3, TURNS[:2])
    assert qwen3.decode(single[0][1], skip_special=False) == "<think>\n\n</think>\n\nthink<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path, eos="<|im_end|>", chat_template=rewriting))
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        template(None).encode(tokenizer, TURNS)


def test_stop_ids_hold_the_end_of_the_answer_and_of_the_text() -> None:
    assert TEMPLATES["qwen"].stop_ids(Letters()) == {2, 4}
    assert TEMPLATES["chatml"].stop_ids(Letters()) == {2, 3, 4}
    assert TEMPLATES["llama2"].stop_ids(Letters()) == {2}


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path))
    with pytest.raises(InputError, match=r"no template is called qwn.*did you mean qwen"):
        template("qwn")
    with pytest.raises(InputError, match=r"brings no chat template; choose one of alpaca"):
        template(None).check(tokenizer)
    with pytest.raises(InputError, match=r"no chat template"):
        template(None).prompt(tokenizer, TURNS[:1])
    object.__setattr__(tokenizer, "eos", None)
    with pytest.raises(InputError, match="names none"):
        TEMPLATES["alpaca"].check(tokenizer)
    TEMPLATES["empty"].check(tokenizer)
    TEMPLATES["chatml"].check(tokenizer)


def test_a_tokenizer_without_the_answers_end_is_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    json = folder / "tokenizer.json"
    json.write_text(json.read_text().replace("<|im_end|>", "<|other|>"))
    with pytest.raises(InputError, match=r"chatml ends every answer with <\|im_end\|>"):
        TEMPLATES["chatml"].check(Tokenizer.load(folder))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "without a question"),
        (TURNS[1:], "message 1 is from assistant"),
        ([TURNS[0], TURNS[0]], "message 2 is from user"),
        (TURNS[:1], "not an answer"),
    ],
)
def test_messages_that_do_not_alternate_are_refused(messages: list[dict[str, str]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TEMPLATES["chatml"].encode(Letters(), messages)
