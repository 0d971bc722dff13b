import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.conversation import IGNORED, Labelled
from mindspeed_core.errors import InputError
from mindspeed_core.templates import TEMPLATES, template
from mindspeed_core.tokenizer import Tokenizer
from tests.letters import Letters
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
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[think<|im_end|>]]"
    "\n<|im_start|>user\nAnd  more?<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]"
)
R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    r"here </think><answer> answer here </answer>Put your final answer within \\boxed{}. "
)
INTERN2 = (
    "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[[think<|im_end|>\n]]<|im_start|>user\nAnd  more?<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>\n]]"
)
MISTRAL = "<s>Be brief.[INST] Hi [/INST][[think</s>]][INST] And  more? [/INST][[Yes.</s>]]"
DEEPSEEK2 = "<s>Be brief.\n\nUser: Hi\n\nAssistant:[[think</s>]]User: And  more?\n\nAssistant:[[Yes.</s>]]"
CHATGLM3 = "[gMASK]sop<|system|>\nBe brief.<|user|>\nHi<|assistant|>[[\nthink]](<|user|>=</s>)\nAnd  more?<|assistant|>[[\nYes.</s>]]"
# The whole conversation of SYSTEM and TURNS, with [[what is learned]]; (a=b): b is learned in the place of a.
WRITTEN = {
    "chatml": CHATML,
    "chatml_de": CHATML,
    "qwen": CHATML,
    "qwen_math_r1": CHATML,
    "qwen_r1": CHATML.replace("user\n", f"user\n{R1}"),
    # Answers without a thought get an empty one, which is given.
    "qwen3": INTERN2.removeprefix("<s>").replace("[[", "<think>\n\n</think>\n\n[["),
    "intern2": INTERN2,
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST][[think</s>]]<s>[INST] And  more? [/INST][[Yes.</s>]]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[think<|eot_id|>]]<|start_header_id|>user"
    "<|end_header_id|>\n\nAnd  more?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Yes.<|eot_id|>]]",
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "gemma": "<s>Be brief.<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n[[think]](<end_of_turn>=</s>)\n"
    "<start_of_turn>user\nAnd  more?<end_of_turn>\n<start_of_turn>model\n[[Yes.</s>]]",
    "deepseek2": DEEPSEEK2,
    "deepseek2-lite": DEEPSEEK2,
    "minicpm3": DEEPSEEK2,
    "deepseek3": "<s>Be brief.<｜User｜>Hi<｜Assistant｜>[[think</s>]]<｜User｜>And  more?<｜Assistant｜>[[Yes.</s>]]",
    "chatglm2": "[gMASK]sopBe brief.[Round 1]\n\n问：Hi\n\n答：[[think]](\n=</s>)\n[Round 2]\n\n问：And  more?\n\n答：[[Yes.</s>]]",
    "chatglm3": CHATGLM3,
    "chatglm3_system": CHATGLM3,
    "glm4": CHATGLM3.replace("sop<", "<sop><"),
    "glm4_moe": CHATGLM3.replace("sop<", "<sop><").replace("[[", "\n<think></think>[["),
    "gpt-oss": "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final"
    "<|message|>[[think]](<|end|>=</s>)<|start|>user<|message|>And  more?<|end|><|start|>assistant<|channel|>final<|message|>"
    "[[Yes.</s>]]",
    "baichuan2": "Be brief.<reserved_106>Hi<reserved_107>[[think]](<reserved_106>=</s>)And  more?<reserved_107>[[Yes.</s>]]",
    "cpm": "<s>Be brief.<用户>Hi<AI>[[think</s>]]<用户>And  more?<AI>[[Yes.</s>]]",
    "hunyuan": "Be brief.Hi[[think]]And  more?[[Yes.]]",
    "alpaca": "Be brief.### Instruction:\nHi\n\n### Response:\n[[think</s>]]\n\n### Instruction:\nAnd  more?\n\n"
    "### Response:\n[[Yes.</s>]]",
    "default": "Be brief.\nHuman: Hi\nAssistant:[[think</s>]]\nHuman: And  more?\nAssistant:[[Yes.</s>]]",
    "trl": "<s>Be brief.Hi[[think]]And  more?[[Yes.]]",
    "empty": "Be brief.Hi[[think]]And  more?[[Yes.]]",
}
DEFAULT_SYSTEMS = {
    "chatml_de": "Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
    "qwen": "You are a helpful assistant.",
    "qwen_r1": "You are a helpful assistant.",
    "qwen_math_r1": r"Please reason step by step, and put your final answer within \boxed{}.",
    "hunyuan": "You are a helpful assistant.",
    "chatglm3_system": "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. "
    "Respond using markdown.",
    "gpt-oss": "You are ChatGPT, a large language model trained by OpenAI.",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
}
THOUGHTS = {  # a thought as it stands in an answer, and how an empty one is written
    "qwen3": ("<think>\nHm.\n</think>\n\n", "<think>\n\n</think>\n\n"),
    "glm4_moe": ("<think>Hm.</think>\n", "\n<think></think>"),
    "gpt-oss": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
}
WEATHER = {
    "name": "weather",
    "description": "Now",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where", "enum": ["Rom", "köln"]},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
}
CALL = {"name": "weather", "arguments": {"city": "köln", "days": [1, 2]}}
WITH_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "function", "content": "", "calls": [CALL]},
    {"role": "observation", "content": '{"rain": true}'},
    {"role": "assistant", "content": "Yes."},
]
DEFAULT_TOOLS = (
    "You have access to the following tools:\n> Tool Name: weather\nTool Description: Now\nTool Args:\n"
    "  - city (string, required): where, should be one of [Rom, köln]\n"
    "  - days (array): , where each item should be integer\n\n"
    "Use the following format if using a tool:\n```\nAction: tool name (one of [weather]).\n"
    "Action Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{"input": "hello world", "num_beams": 5}```).\n```\n'
)
ARGUMENTS = '{"city": "köln", "days": [1, 2]}'
WITH_TOOLS = {
    "qwen": f"<|im_start|>system\nYou are a helpful assistant.{DEFAULT_TOOLS}<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
    f"<|im_start|>assistant\n[[Action: weather\nAction Input: {ARGUMENTS}<|im_end|>]]\n<|im_start|>tool\n"
    '{"rain": true}<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]',
    "llama2": f"<s>[INST] <<SYS>>\n{DEFAULT_TOOLS}\n<</SYS>>\n\nRain? [/INST][[Action: weather\nAction Input: {ARGUMENTS}</s>]]"
    '<s>[INST] {"rain": true} [/INST][[Yes.</s>]]',
    "glm4": "[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的"
    f"问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## weather\n\n{json.dumps(WEATHER, indent=4, ensure_ascii=False)}\n"
    f"在调用上述函数时，请使用 Json 格式表示调用的参数。<|user|>\nRain?<|assistant|>[[weather\n{ARGUMENTS}]](<|observation|>=</s>)\n"
    '{"rain": true}<|assistant|>[[\nYes.</s>]]',
    "glm4_moe": "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    f"{json.dumps({'type': 'function', 'function': WEATHER}, ensure_ascii=False)}\n</tools>\n\n"
    "For each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
    "<|user|>\nRain?<|assistant|>\n<think></think>[[\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>köln</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>]](<|observation|>=</s>)\n<tool_response>\n"
    '{"rain": true}\n</tool_response><|assistant|>\n<think></think>[[\nYes.</s>]]',
}
SEVERAL: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "function", "content": "Let me see.", "calls": [CALL, {"name": "now", "arguments": {}}]},
    {"role": "observation", "content": '{"rain": true}'},
    {"role": "observation", "content": "12:00"},
    {"role": "assistant", "content": "Yes."},
]
ACTIONS = f"Let me see.\nAction: weather\nAction Input: {ARGUMENTS}\nAction: now\nAction Input: {{}}"
CHATML_SEVERAL = (
    f"<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n[[{ACTIONS}<|im_end|>]]\n<|im_start|>tool\n"
    '{"rain": true}<|im_end|>\n<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]'
)
ONE_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
WITH_SEVERAL = {  # several calls in one message, and the answers of the tools in a row
    "chatml": ONE_SYSTEM + CHATML_SEVERAL,
    "chatml_de": ONE_SYSTEM + CHATML_SEVERAL,
    "qwen": ONE_SYSTEM + CHATML_SEVERAL,
    "qwen_math_r1": ONE_SYSTEM + CHATML_SEVERAL,
    "qwen_r1": ONE_SYSTEM + CHATML_SEVERAL.replace("user\n", f"user\n{R1}"),
    "qwen3": f"{ONE_SYSTEM}<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[Let me see.\n"
    f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n'
    '</tool_call><|im_end|>\n]]<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response>\n<tool_response>\n12:00\n'
    "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[Yes.<|im_end|>\n]]",
    "glm4_moe": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nRain?<|assistant|>\n<think></think>[[\nLet me see.\n"
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>köln</arg_value>\n<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n"
    "</tool_call>\n<tool_call>now\n</tool_call>]](<|observation|>=</s>)\n"
    '<tool_response>\n{"rain": true}\n</tool_response>\n<tool_response>\n12:00\n</tool_response><|assistant|>\n<think></think>'
    "[[\nYes.</s>]]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nRain?"
    f"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[{ACTIONS}<|eot_id|>]]<|start_header_id|>tool<|end_header_id|>\n\n"
    '{"rain": true}<|eot_id|><|start_header_id|>tool<|end_header_id|>\n\n12:00<|eot_id|><|start_header_id|>assistant'
    "<|end_header_id|>\n\n[[Yes.<|eot_id|>]]",
    "gemma": f"<s>Be brief.<start_of_turn>user\nRain?<end_of_turn>\n<start_of_turn>model\n[[{ACTIONS}]](<end_of_turn>=</s>)\n"
    '<start_of_turn>tool\n{"rain": true}<end_of_turn>\n<start_of_turn>tool\n12:00<end_of_turn>\n<start_of_turn>model\n[[Yes.</s>]]',
}


def written(labelled: Labelled, tokenizer: Any) -> str:
    """A conversation in the notation of WRITTEN."""
    text, learned = "", False
    for id, label in zip(*labelled, strict=True):
        if (label == id) != learned:
            learned = not learned
            text += "[[" if learned else "]]"
        here = tokenizer.decode([id])
        text += here if label in (id, IGNORED) else f"({here}={tokenizer.decode([label])})"
    return text + "]]" * learned


def unmarked(text: str) -> str:
    """The text that is fed to the model."""
    for mark in ("[[", "]]", "(", "=</s>)"):
        text = text.replace(mark, "")
    return text


@pytest.fixture(scope="module")
def qwen3(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers/qwen3")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_conversation_is_written_as_its_model_knows_it(name: str) -> None:
    tokenizer = Letters()
    TEMPLATES[name].check(tokenizer)
    assert written(TEMPLATES[name].encode(tokenizer, [SYSTEM, *TURNS]), tokenizer) == WRITTEN[name]
    prompt = tokenizer.decode(TEMPLATES[name].prompt(tokenizer, [SYSTEM, *TURNS[:3]]))
    expected = WRITTEN[name].rsplit("[[", 1)[0]
    if name in THOUGHTS:  # the model thinks first, or not: no thought is written for the answer that is to come
        empty = THOUGHTS[name][1]
        expected = expected.removesuffix(empty)
        expected = expected.replace(empty, "") if name == "qwen3" else expected
    assert prompt == unmarked(expected)


def test_the_documentation_names_every_template() -> None:
    page = (Path(__file__).parents[2] / "docs/conversations.md").read_text()
    assert {name for name in TEMPLATES if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_default_system_text_stands_where_none_is_given(name: str) -> None:
    tokenizer = Letters()
    prompt = tokenizer.decode(TEMPLATES[name].prompt(tokenizer, TURNS[:1]))
    default = DEFAULT_SYSTEMS.get(name, "")
    filled = tokenizer.decode(TEMPLATES[name].prompt(tokenizer, TURNS[:1], default or "Be brief."))
    assert (prompt == filled) == bool(default)
    assert default in prompt
    assert "Be brief." not in prompt


@pytest.mark.parametrize("name", sorted(THOUGHTS))
def test_thoughts_stay_are_learned_or_are_left_out(name: str) -> None:
    tokenizer, (thought, empty) = Letters(), THOUGHTS[name]
    thoughtful = [TURNS[0], {"role": "assistant", "content": thought + "think"}, *TURNS[2:]]
    plain = template(name).encode(tokenizer, TURNS)
    kept = written(template(name).encode(tokenizer, thoughtful), tokenizer)
    mark = "\n" if name == "glm4_moe" else ""  # before every answer
    assert kept == written(plain, tokenizer).replace(f"{empty}[[{mark}think", f"[[{mark}{thought}think")
    learned = template(name, thinking=True).encode(tokenizer, TURNS)
    assert written(learned, tokenizer) == written(plain, tokenizer).replace(f"{empty}[[", f"[[{empty}")
    assert template(name, thinking=False).encode(tokenizer, thoughtful) == plain
    prompt = template(name).prompt(tokenizer, thoughtful[:3])
    assert template(name, thinking=False).prompt(tokenizer, thoughtful[:3]) == prompt + tokenizer.encode(empty)
    # In chat earlier thoughts are gone, and so they are where the last answer alone is learned.
    last = template(name).encode(tokenizer, thoughtful, learn="last")
    assert last.ids[: len(prompt)] == prompt
    assert tokenizer.decode([i for i in last.labels if i != IGNORED]).startswith(f"{mark}Yes.")


@pytest.mark.parametrize("name", sorted(THOUGHTS))
def test_a_thought_may_stand_beside_its_answer(name: str) -> None:
    tokenizer = Letters()
    within = [TURNS[0], {"role": "assistant", "content": THOUGHTS[name][0] + "think"}]
    beside = [TURNS[0], {"role": "assistant", "content": "think", "thought": "Hm."}]
    for thinking in (None, True, False):
        chosen = template(name, thinking=thinking)
        for more in ([], TURNS[2:]):
            for learn in ("answers", "last"):
                expected = chosen.encode(tokenizer, [*within, *more], learn=learn)
                assert chosen.encode(tokenizer, [*beside, *more], learn=learn) == expected
        expected = chosen.prompt(tokenizer, [*within, TURNS[2]])
        assert chosen.prompt(tokenizer, [*beside, TURNS[2]]) == expected
    assert "Hm." in tokenizer.decode(template(name).encode(tokenizer, beside).ids)


def test_a_thought_that_a_template_would_lose_is_refused(tmp_path: Path) -> None:
    messages = [TURNS[0], {"role": "assistant", "content": "think", "thought": "Hm."}]
    with pytest.raises(ValueError, match="template qwen writes no thoughts that stand beside an answer"):
        template("qwen").encode(Letters(), messages)
    own = Tokenizer.load(tiny_tokenizer(tmp_path, eos="<|eot_id|>", chat_template=LLAMA3))
    with pytest.raises(ValueError, match="the tokenizer's chat template writes no reasoning_content"):
        template(None).encode(own, messages)


@pytest.mark.real_data
@pytest.mark.parametrize("content", ["", "Let me see."])
@pytest.mark.parametrize("before", [[], TURNS[:2]])
@pytest.mark.parametrize("thought", ["Hm.", "\nHm.\n\nYes.\n"])
def test_thoughts_beside_answers_equal_the_tokenizers_own_template(
    qwen3: Tokenizer, content: str, before: list[dict[str, Any]], thought: str
) -> None:
    call = {"role": "function", "content": content, "thought": thought, "calls": [CALL]}
    answer = {**TURNS[3], "thought": thought}
    ours = [*before, SEVERAL[0], call, SEVERAL[2], answer]
    called = {"tool_calls": [{"type": "function", "function": CALL}]}
    theirs = [
        *before,
        SEVERAL[0],
        {"role": "assistant", "content": content, "reasoning_content": thought, **called},
        {"role": "tool", "content": SEVERAL[2]["content"]},
        {**TURNS[3], "reasoning_content": thought},
    ]
    tools = [{"type": "function", "function": WEATHER}]
    ids = qwen3.hf.apply_chat_template(theirs, tools=tools, return_dict=False)
    assert "Hm." in qwen3.decode(ids)
    assert template("qwen3").encode(qwen3, ours, tools=[WEATHER], learn="last").ids == ids
    own = template(None).encode(qwen3, ours, tools=[WEATHER], learn="last")
    assert [*own.ids, *qwen3.encode("\n")] == ids
    learned = qwen3.decode([i for i in own.labels if i != IGNORED], skip_special=False)
    assert learned == f"<think>\n{thought.strip()}\n</think>\n\nYes.<|im_end|>"
    ids = qwen3.hf.apply_chat_template(theirs[:-1], tools=tools, add_generation_prompt=True, return_dict=False)
    assert template("qwen3").prompt(qwen3, ours[:-1], tools=[WEATHER]) == ids
    assert template(None).prompt(qwen3, ours[:-1], tools=[WEATHER]) == ids


@pytest.mark.parametrize("name", sorted(WITH_TOOLS))
def test_tools_and_calls_are_written(name: str) -> None:
    tokenizer = Letters()
    labelled = TEMPLATES[name].encode(tokenizer, WITH_CALL, tools=[WEATHER])
    assert written(labelled, tokenizer) == WITH_TOOLS[name]
    prompt = TEMPLATES[name].prompt(tokenizer, WITH_CALL[:1], tools=[WEATHER])
    assert labelled.ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("name", "calls", "content", "tools", "said"),
    [
        ("glm4", [CALL, CALL], "", [], "template glm4 writes one function call in a message"),
        ("glm4", [CALL], "Let me see.", [], "template glm4 writes one function call in a message"),
        ("gpt-oss", [CALL], "", [], "template gpt-oss writes no function calls"),
        ("gpt-oss", [CALL], "", [WEATHER], "template gpt-oss writes no tools"),
        ("qwen", [CALL], "", [{"name": "x"}], "tools that cannot be written: .*parameters"),
    ],
)
def test_what_a_template_cannot_write_is_said(
    name: str, calls: list[Any], content: str, tools: list[Any], said: str
) -> None:
    messages = [WITH_CALL[0], {"role": "function", "content": content, "calls": calls}]
    with pytest.raises(ValueError, match=said):
        TEMPLATES[name].encode(Letters(), messages, tools=tools)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_answers_of_several_tools_are_one_question(name: str) -> None:
    """Where a template has a form for them; others say so, and none writes them as questions of the user."""
    tokenizer = Letters()
    messages = SEVERAL
    if name not in WITH_SEVERAL:
        messages = [*WITH_CALL[:3], *SEVERAL[3:]]
        with pytest.raises(
            ValueError, match=f"template {name} writes (one answer of a tool at a time|no function calls)"
        ):
            TEMPLATES[name].encode(tokenizer, messages)
        return
    labelled = TEMPLATES[name].encode(tokenizer, [SYSTEM, *messages])
    assert written(labelled, tokenizer) == WITH_SEVERAL[name]
    prompt = TEMPLATES[name].prompt(tokenizer, [SYSTEM, *messages[:-1]])
    expected = unmarked(WITH_SEVERAL[name].rsplit("[[", 1)[0])
    if name in THOUGHTS:
        empty = THOUGHTS[name][1]
        expected = expected.removesuffix(empty)
        expected = expected.replace(empty, "") if name == "qwen3" else expected
    assert tokenizer.decode(prompt) == expected


def test_a_text_that_looks_like_a_place_stays_text() -> None:
    messages = [{"role": "user", "content": "{{idx}} {{content}}"}, TURNS[1]]
    assert "问：{{idx}} {{content}}\n" in Letters().decode(TEMPLATES["chatglm2"].encode(Letters(), messages).ids)


def test_what_is_learned_can_be_chosen() -> None:
    tokenizer, gemma = Letters(), TEMPLATES["gemma"]
    answers, last, everything = (
        gemma.encode(tokenizer, TURNS, learn="answers"),
        gemma.encode(tokenizer, TURNS, learn="last"),
        gemma.encode(tokenizer, TURNS, learn="all"),
    )
    assert answers.ids == last.ids == everything.ids == everything.labels
    assert tokenizer.decode([i for i in answers.labels if i != IGNORED]) == "think</s>Yes.</s>"
    assert tokenizer.decode([i for i in last.labels if i != IGNORED]) == "Yes.</s>"


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["qwen", "chatml", "chatml_de", "qwen_math_r1", "qwen3"])
@pytest.mark.parametrize("turns", [1, 3])
def test_prompts_equal_the_tokenizers_own_template(qwen3: Tokenizer, name: str, turns: int) -> None:
    for messages in [[SYSTEM, *TURNS[:turns]], *([] if name in DEFAULT_SYSTEMS else [TURNS[:turns]])]:
        theirs = qwen3.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert TEMPLATES[name].prompt(qwen3, messages) == theirs
        assert template(None).prompt(qwen3, messages) == theirs
    theirs = qwen3.hf.apply_chat_template(
        TURNS[:turns], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert template("qwen3", thinking=False).prompt(qwen3, TURNS[:turns]) == theirs


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["qwen", "chatml", "chatml_de", "qwen_math_r1", "qwen_r1", "intern2"])
@pytest.mark.parametrize("turns", [2, 4])
def test_ids_and_labels_equal_the_tokenizers_own_template(qwen3: Tokenizer, name: str, turns: int) -> None:
    """Qwen3 writes an empty thought before the last answer and a newline behind it, as some of these do; the rest is the same."""
    ask = R1 if name == "qwen_r1" else ""
    theirs = [
        {**message, "content": (ask if message["role"] == "user" else "") + message["content"]} for message in TURNS
    ]
    whole = qwen3.hf.apply_chat_template([SYSTEM, *theirs[:turns]], tokenize=False).replace(
        "<think>\n\n</think>\n\n", ""
    )
    end = "<|im_end|>\n" if name == "intern2" else "<|im_end|>"
    encoding = qwen3.backend.encode(whole if name == "intern2" else whole.removesuffix("\n"), add_special_tokens=False)
    spans, at = [], 0
    for message in theirs[1:turns:2]:
        at = whole.index("assistant\n", at) + len("assistant\n")
        spans.append(range(at, at + len(message["content"] + end)))
    learned = [any(start in span for span in spans) for start, _ in encoding.offsets]
    found = TEMPLATES[name].encode(qwen3, [SYSTEM, *TURNS[:turns]])
    assert found.ids == encoding.ids
    assert found.labels == [id if given else IGNORED for id, given in zip(encoding.ids, learned, strict=True)]


@pytest.mark.real_data
def test_qwen3_equals_the_tokenizers_own_template(qwen3: Tokenizer) -> None:
    """Thoughts, tools and calls included; only the newline after the last answer is learned in one and left out in the other."""
    thoughtful = [TURNS[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}]
    for messages in (TURNS, [SYSTEM, *TURNS], thoughtful, [*thoughtful, *TURNS[2:]]):
        ours = template("qwen3").encode(qwen3, messages, learn="last")
        assert ours.ids == qwen3.hf.apply_chat_template(messages, return_dict=False)
        if len(messages) == 2:
            assert template("qwen3").encode(qwen3, messages) == ours
            own = template(None).encode(qwen3, messages)
            assert (ours.ids[:-1], ours.labels[:-1]) == own
    calls = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}] * 2},
        {"role": "tool", "content": '{"rain": true}'},
        TURNS[3],
    ]
    for system in (None, "Be brief."):
        ours = [TURNS[0], {"role": "function", "content": "", "calls": [CALL, CALL]}, *WITH_CALL[2:3], TURNS[3]]
        theirs = qwen3.hf.apply_chat_template(
            [*([SYSTEM] if system else []), *calls],
            tools=[{"type": "function", "function": WEATHER}],
            return_dict=False,
        )
        own = template(None).encode(qwen3, ours, system, [WEATHER])
        assert [*own.ids, *qwen3.encode("\n")] == theirs
        learned = qwen3.decode([i for i in own.labels if i != IGNORED], skip_special=False)
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "köln", "days": [1, 2]}}\n</tool_call>'
        assert learned == f"{call}\n{call}<|im_end|><think>\n\n</think>\n\nYes.<|im_end|>"
        assert template("qwen3").encode(qwen3, ours, system, [WEATHER], learn="last").ids == theirs


@pytest.mark.real_data
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("thought", ["", "<think>\nHm.\n</think>\n\n"])
@pytest.mark.parametrize("before", [[], TURNS[:2]])
def test_answers_of_tools_equal_the_tokenizers_own_template(
    qwen3: Tokenizer, calls: int, thought: str, before: list[dict[str, Any]]
) -> None:
    """Several in a row, and thoughts between a question and its last answer, which stay while it is the current one."""
    call = {**SEVERAL[1], "content": thought + SEVERAL[1]["content"], "calls": SEVERAL[1]["calls"][:calls]}
    theirs_call = {
        "role": "assistant",
        "content": call["content"],
        "tool_calls": [{"type": "function", "function": each} for each in call["calls"]],
    }
    observations = SEVERAL[2 : 2 + calls]
    theirs_observations = [{"role": "tool", "content": each["content"]} for each in observations]
    tools = [{"type": "function", "function": WEATHER}]
    for after in ([], TURNS[2:3]):  # and are gone with the next question
        answer = [SEVERAL[4]] if after else []
        ours = [*before, SEVERAL[0], call, *observations, *answer, *after]
        theirs = [*before, SEVERAL[0], theirs_call, *theirs_observations, *answer, *after]
        ids = qwen3.hf.apply_chat_template(theirs, tools=tools, add_generation_prompt=True, return_dict=False)
        assert template(None).prompt(qwen3, ours, tools=[WEATHER]) == ids
        assert template("qwen3").prompt(qwen3, ours, tools=[WEATHER]) == ids
        ids = qwen3.hf.apply_chat_template([*theirs, TURNS[3]], tools=tools, return_dict=False)
        own = template(None).encode(qwen3, [*ours, TURNS[3]], tools=[WEATHER], learn="last")
        assert [*own.ids, *qwen3.encode("\n")] == ids
        written_out = template("qwen3").encode(qwen3, [*ours, TURNS[3]], tools=[WEATHER], learn="last")
        assert written_out.ids == ids
        learned = [
            qwen3.decode([i for i in labels if i != IGNORED], skip_special=False) for _, labels in (own, written_out)
        ]
        assert learned == ["<think>\n\n</think>\n\nYes.<|im_end|>", "Yes.<|im_end|>\n"]


@pytest.mark.real_data
def test_mistral_is_tokenised_slot_by_slot(shared_data: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = shared_data / "tokenizers/mistral_v1"
    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    labelled = TEMPLATES["mistral"].encode(Tokenizer.load(folder), TURNS)
    slots = ["[INST] Hi [/INST]", "think", "[INST] And  more? [/INST]", "Yes."]
    first, second, third, fourth = (list(pieces.encode(slot)) for slot in slots)
    assert labelled.ids == [1, *first, *second, 2, *third, *fourth, 2]
    ignored = [[IGNORED] * len(slot) for slot in (first, third)]
    assert labelled.labels == [IGNORED, *ignored[0], *second, 2, *ignored[1], *fourth, 2]


BOS, EOS = object(), object()
SLOTS = {  # SYSTEM and TURNS as the original's lists of slots have them: what is given, what is learned, in turn
    "llama2": [
        ([BOS, "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"], ["think", EOS]),
        ([BOS, "[INST] And  more? [/INST]"], ["Yes.", EOS]),
    ],
    "mistral": [
        ([BOS, "Be brief.", "[INST] Hi [/INST]"], ["think", EOS]),
        (["[INST] And  more? [/INST]"], ["Yes.", EOS]),
    ],
    "alpaca": [
        (["Be brief.", "### Instruction:\nHi\n\n### Response:\n"], ["think", EOS]),
        (["\n\n", "### Instruction:\nAnd  more?\n\n### Response:\n"], ["Yes.", EOS]),
    ],
    "default": [
        (["Be brief.\n", "Human: Hi\nAssistant:"], ["think", EOS]),
        (["\n", "Human: And  more?\nAssistant:"], ["Yes.", EOS]),
    ],
    "deepseek2": [
        ([BOS, "Be brief.\n\n", "User: Hi\n\nAssistant:"], ["think", EOS]),
        (["User: And  more?\n\nAssistant:"], ["Yes.", EOS]),
    ],
    "cpm": [
        ([BOS, "Be brief.", "<用户>Hi<AI>"], ["think", EOS]),
        (["<用户>And  more?<AI>"], ["Yes.", EOS]),
    ],
    "trl": [([BOS, "Be brief.", "Hi"], ["think"]), (["And  more?"], ["Yes."])],
    "hunyuan": [(["Be brief.", "Hi"], ["think"]), (["And  more?"], ["Yes."])],
}
for alike, of in {
    "mixtral": "mistral",
    "deepseek2-lite": "deepseek2",
    "minicpm3": "deepseek2",
    "empty": "hunyuan",
}.items():
    SLOTS[alike] = SLOTS[of]
GOLDEN = {  # the same ids written out, so that neither our code nor the oracle can move alone
    (
        "llama2",
        "mistral_v1",
    ): "1 733 16289 28793 2087 18741 4060 13 3574 6817 28723 13 28789 700 18741 4060 13 13 23809 733 "
    "28748 16289 28793 1073 2 1 733 16289 28793 1015 28705 680 28804 733 28748 16289 28793 5592 28723 2",
    (
        "alpaca",
        "gpt2",
    ): "3856 4506 13 21017 46486 25 198 17250 198 198 21017 18261 25 198 14925 50256 628 21017 46486 25 198 "
    "1870 220 517 30 198 198 21017 18261 25 198 5297 13 50256",
}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (name, folder)
        for name in sorted(SLOTS)
        for folder in ("gpt2", "mistral_v1", "mistral_v3")
        # the [INST] of v3 is a control token, which sentencepiece itself never makes of a text
        if folder != "mistral_v3" or name not in ("llama2", "mistral", "mixtral")
    ],
)
def test_plain_templates_are_tokenised_slot_by_slot(shared_data: Path, name: str, folder: str) -> None:
    """With the libraries themselves on slots written out here: a token never spans two of them, as one of a whole text would."""
    path = shared_data / "tokenizers" / folder
    if folder == "gpt2":
        from tokenizers import ByteLevelBPETokenizer

        bytes_of = ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
        encode, specials = lambda text: bytes_of.encode(text).ids, {BOS: 50256, EOS: 50256}
    else:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(str(path / "tokenizer.model"))
        encode, specials = lambda text: list(pieces.encode(text)), {BOS: 1, EOS: 2}

    def ids_of(slots: list[Any]) -> list[int]:
        return [id for slot in slots for id in ([specials[slot]] if slot in specials else encode(slot))]

    ids: list[int] = []
    labels: list[int] = []
    for given, learned in SLOTS[name]:
        ids += ids_of(given) + ids_of(learned)
        labels += [IGNORED] * len(ids_of(given)) + ids_of(learned)
    found = TEMPLATES[name].encode(Tokenizer.load(path), [SYSTEM, *TURNS])
    assert found == Labelled(ids, labels)
    if (name, folder) in GOLDEN:
        assert found.ids == list(map(int, GOLDEN[name, folder].split()))
    if name == "alpaca":
        text = "".join(slot for turn in SLOTS[name] for part in turn for slot in part if isinstance(slot, str))
        plain = [id for id in found.ids if id != specials[EOS]]
        assert encode(text) != plain  # a whole text has other ids


def test_llama3_equals_the_published_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path, eos="<|eot_id|>", chat_template=LLAMA3))
    object.__setattr__(tokenizer, "bos", tokenizer.id_of("<|endoftext|>"))
    tokenizer.hf.bos_token = "<|endoftext|>"
    for messages in (TURNS, [SYSTEM, *TURNS]):
        theirs = tokenizer.hf.apply_chat_template(messages, return_dict=False)
        for ours in (TEMPLATES["llama3"], template("tokenizer")):
            assert ours.encode(tokenizer, messages).ids == theirs
        theirs = tokenizer.hf.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert TEMPLATES["llama3"].prompt(tokenizer, messages[:-1]) == theirs
    assert TEMPLATES["llama3"].encode(tokenizer, TURNS) == template(None).encode(tokenizer, TURNS)


@pytest.mark.real_data
def test_the_tokenizers_own_template_learns_answers_and_their_end(qwen3: Tokenizer) -> None:
    labelled = template(None).encode(qwen3, [SYSTEM, *TURNS])
    theirs = qwen3.hf.apply_chat_template([SYSTEM, *TURNS], return_dict=False)
    assert theirs == [*labelled.ids, *qwen3.encode("\n")]
    # An answer "think" is not found inside the <think> tags that Qwen3 writes before its last answer.
    answers = [qwen3.decode(b, skip_special=False) for _, b in template(None).turns(qwen3, [SYSTEM, *TURNS])]
    assert answers == ["think<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"]
    ((_, answer),) = template(None).turns(qwen3, TURNS[:2])
    assert qwen3.decode(answer, skip_special=False) == "<think>\n\n</think>\n\nthink<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path, eos="<|im_end|>", chat_template=rewriting))
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        template(None).encode(tokenizer, TURNS)


def test_stop_ids_hold_the_end_of_the_answer_and_of_the_text() -> None:
    letters = Letters()
    assert TEMPLATES["qwen"].stop_ids(letters) == set(map(letters.id_of, ("</s>", "<|im_end|>")))
    assert TEMPLATES["chatml"].stop_ids(letters) == set(map(letters.id_of, ("</s>", "<|im_end|>", "<|im_start|>")))
    assert TEMPLATES["glm4"].stop_ids(letters) == set(map(letters.id_of, ("</s>", "<|user|>", "<|observation|>")))
    assert TEMPLATES["llama2"].stop_ids(letters) == {letters.eos}


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path))
    with pytest.raises(InputError, match=r"no template is called qwn.*did you mean qwen"):
        template("qwn")
    with pytest.raises(InputError, match=r"brings no chat template; choose one of alpaca, baichuan2"):
        template(None).check(tokenizer)
    with pytest.raises(InputError, match=r"no chat template"):
        template(None).prompt(tokenizer, TURNS[:1])
    with pytest.raises(InputError, match=r"template qwen marks no thoughts .* glm4_moe, gpt-oss, qwen3"):
        template("qwen", thinking=False)
    with pytest.raises(InputError, match=r"template chatglm2 writes \[gMASK\] as one token, which the tokenizer in"):
        TEMPLATES["chatglm2"].check(tokenizer)
    with pytest.raises(
        InputError, match=r"template gemma writes <start_of_turn> .* fits .*: alpaca, .* llama3, .*, trl$"
    ):
        TEMPLATES["gemma"].check(tokenizer)
    object.__setattr__(tokenizer, "eos", None)
    with pytest.raises(InputError, match="names none"):
        TEMPLATES["alpaca"].check(tokenizer)
    unended = Letters()
    unended.eos = None
    with pytest.raises(InputError, match="names none"):
        TEMPLATES["gemma"].check(unended)
    TEMPLATES["empty"].check(tokenizer)
    TEMPLATES["chatml"].check(tokenizer)


PLAIN = {"alpaca", "cpm", "deepseek2", "deepseek2-lite", "default", "empty", "hunyuan", "llama2", "minicpm3", "mistral"}
PLAIN |= {"mixtral", "trl"}  # text alone, to the tokenizers of their own models, too
CHATML_KIN = {"chatml", "chatml_de", "intern2", "qwen", "qwen3", "qwen_math_r1", "qwen_r1"}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "fitting"),
    [("gpt2", PLAIN), ("mistral_v1", PLAIN), ("mistral_v3", PLAIN), ("qwen3", PLAIN | CHATML_KIN)],
)
def test_a_template_fits_tokenizers_that_have_its_marks(shared_data: Path, folder: str, fitting: set[str]) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / folder)
    assert {name for name, each in TEMPLATES.items() if each.lacking(tokenizer) is None} == fitting
    for name in TEMPLATES.keys() - fitting:
        with pytest.raises(InputError) as said:
            TEMPLATES[name].check(tokenizer)
        lacking = TEMPLATES[name].lacking(tokenizer)
        assert lacking is not None
        assert f" {lacking}" in str(said.value)
        assert len(str(said.value).splitlines()) == 1
        assert str(said.value).endswith(", ".join(sorted(fitting)))


def test_a_token_that_no_text_becomes_is_none(tmp_path: Path) -> None:
    """A mark that stands in the vocabulary as an ordinary piece, which no merge ever makes."""
    folder = tiny_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_start|>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.id_of("<|im_start|>") is not None
    assert TEMPLATES["qwen"].lacking(tokenizer) == "<|im_start|>"


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
        (TURNS[1:], "message 1 is from assistant, not from user"),
        (WITH_CALL[2:], "message 1 is from observation, not from user"),
        ([TURNS[0], TURNS[0]], "message 2 is from user, not from assistant or function"),
        ([*WITH_CALL[:3], TURNS[0]], "message 4 is from user, not from assistant or function or observation"),
        (TURNS[:1], "not an answer"),
        ([SYSTEM, *TURNS], "two system texts"),
    ],
)
def test_messages_that_do_not_alternate_are_refused(messages: list[dict[str, str]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TEMPLATES["chatml"].encode(Letters(), messages, "Be kind." if messages[:1] == [SYSTEM] else None)
    if messages == [SYSTEM, *TURNS]:
        return
    if messages == TURNS[:1]:
        messages = TURNS[:2]
        said = "not a question"
    with pytest.raises(ValueError, match=said):
        TEMPLATES["chatml"].prompt(Letters(), messages)
