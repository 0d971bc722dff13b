"""Generation and scoring equal transformers on tiny random models, alone and split; every ending leaves the ranks in step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mindspeed_core.errors import InputError
from mindspeed_core.generate.engine import Engine
from mindspeed_core.generate.sampling import SamplingConfig
from tests.core.engines import run

LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]  # the last one sees five positions
GREEDY = SamplingConfig(max_new_tokens=12)
SAMPLED = SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, seed=5, max_new_tokens=8)
PROMPTS = [[5, 17, 80], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42], [90, 3, 3, 61, 12]]
LONG = list(range(40)) * 4
REQUESTS = [
    ([5, 17, 80], [4, 9]),
    ([1, 2, 3, 4], [7]),
    ([1, 2, 3, 4], [8]),
    ([1, 2, 3], [4, 8]),  # the same pass as the two above
    (list(range(90)) * 2, [11, 12, 13]),  # its beginning does not fit
    ([7], list(range(60))),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """transformers' models; the ranks get their tensors, since loading transformers takes them many seconds."""
    from tests.core.models.tiny import hf_model

    return {family: hf_model(family, tied=family == "llama") for family in FAMILIES} | {
        "baichuan": hf_model("baichuan", groups=8)  # linear biases
    }


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=lambda layout: "-".join(f"{k}={v}" for k, v in layout.items()) or "one"
)
def heard(request: pytest.FixtureRequest, models: dict[str, Any]) -> dict[str, Any]:
    """All that one layout answers, by the name of the question."""
    from tests.core.models.tiny import config_of

    sent = {family: (config_of(model), dict(model.state_dict())) for family, model in models.items()}
    answers = run(
        request.param,
        *((greedy, sent[family]) for family in FAMILIES),
        (sampled, sent["llama"]),
        (ended_in_every_way, sent["llama"]),
        (at_the_end_of_the_context, sent["llama"]),
        (scored, sent["qwen2"]),
        (of_any_length, sent["qwen3"]),
        (of_any_length, (*sent["qwen3"], {"read": 16, "scored": 3})),
        (greedy, (*sent["mistral"], {"read": 4})),
        (greedy, sent["baichuan"]),
    )
    names = [*FAMILIES, "sampled", "endings", "context", "scores", "whole", "pieces", "window", "baichuan"]
    return dict(zip(names, answers, strict=True))


def greedy(engine: Engine) -> tuple[list[list[int]], list[list[int]], list[int]]:
    alone = [list(engine.generate(prompt, GREEDY)) for prompt in PROMPTS]
    together = engine.generate_batch(PROMPTS, GREEDY)
    return alone, together, list(engine.generate(PROMPTS[0], GREEDY, stop_ids=[alone[0][7]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, models: dict[str, Any], heard: dict[str, Any]) -> None:
    expected = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        out = models[family].generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    alone, together, stopped = heard[family]
    assert alone == expected
    assert together == expected, "padding changed an answer"
    assert stopped == expected[0][: expected[0].index(expected[0][7])]


def test_greedy_tokens_are_those_of_a_model_without_a_cache(models: dict[str, Any], heard: dict[str, Any]) -> None:
    expected = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(models["baichuan"](torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert heard["baichuan"][:2] == (expected, expected)


def sampled(engine: Engine) -> tuple[list[list[int]], list[list[int]], list[int]]:
    alone = [list(engine.generate(prompt, SAMPLED)) for prompt in PROMPTS]
    other = SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, seed=6, max_new_tokens=8)
    return alone, engine.generate_batch(PROMPTS, SAMPLED), list(engine.generate(PROMPTS[0], other))


SEEN: list[list[list[int]]] = []  # what each layout has drawn


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_layout(heard: dict[str, Any]) -> None:
    alone, together, other = heard["sampled"]
    assert together == alone
    assert other != alone[0]
    SEEN.append(alone)
    assert alone == SEEN[0]


def ended_in_every_way(engine: Engine) -> dict[str, Any]:
    told: dict[str, Any] = {"whole": list(engine.generate(PROMPTS[0], GREEDY))}
    begun = engine.generate(PROMPTS[1], GREEDY)
    told["begun"] = [next(begun) for _ in range(3)]
    begun.close()  # type: ignore[attr-defined]
    never_asked = engine.generate(PROMPTS[1], GREEDY)
    replaced = engine.generate(PROMPTS[1], GREEDY)
    next(replaced)
    told["again"] = list(engine.generate(PROMPTS[0], GREEDY))  # ends the one before
    told["late"] = list(replaced)
    with pytest.raises(InputError):
        engine.generate([], GREEDY)
    told["dropped"] = next(engine.generate(PROMPTS[1], GREEDY))
    told["scored"] = engine.loglikelihood([(PROMPTS[0], told["whole"])])
    told["cut"] = engine.generate_batch(
        [PROMPTS[0]] * 2, GREEDY, finished=lambda row, answer: row == 1 and len(answer) == 2
    )
    told["none"] = engine.generate_batch([], GREEDY)
    told["first"] = next(never_asked)  # and is left open when the engine closes
    return told


def test_a_generation_that_is_stopped_leaves_the_engine_usable(heard: dict[str, Any]) -> None:
    told = heard["endings"]
    assert told["again"] == told["whole"]
    assert told["late"] == told["none"] == []
    assert told["begun"][0] == told["dropped"] == told["first"]
    assert told["scored"][0][1], "what greedy decoding wrote scores as greedy"
    assert told["cut"] == [told["whole"], told["whole"][:2]]


def at_the_end_of_the_context(engine: Engine) -> Any:
    with pytest.raises(InputError, match="has 129 tokens, but the model reads at most 128"):
        engine.generate(LONG[:129], GREEDY)
    with pytest.raises(InputError, match="token 99, but the model knows 99"):
        engine.generate([99], GREEDY)
    counts = [len(list(engine.generate(LONG[:n], GREEDY))) for n in (128, 127, 120)]
    return counts, [len(answer) for answer in engine.generate_batch([LONG[:128], LONG[:120], [1]], GREEDY)]


def test_an_answer_ends_where_the_context_is_full(heard: dict[str, Any]) -> None:
    assert heard["context"] == ([1, 2, 9], [1, 9, 12])


def scored(engine: Engine) -> Any:
    told: list[int] = []
    answers = [engine.loglikelihood(REQUESTS, batch_size=size, progress=told.append) for size in (1, 4)]
    return answers, sum(told)


def test_loglikelihoods_equal_transformers(models: dict[str, Any], heard: dict[str, Any]) -> None:
    expected = []
    for context, continuation in REQUESTS:
        tokens = [*context, *continuation][-129:]
        with torch.no_grad():
            logits = models["qwen2"](torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :]
        target = torch.tensor(continuation)
        total = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
        expected.append((total, bool((logits.argmax(-1) == target).all())))
    answers, answered = heard["scores"]
    assert answered == 2 * len(REQUESTS)
    for got in answers:
        for (total, is_greedy), (wanted, wanted_greedy) in zip(got, expected, strict=True):
            assert math.isclose(total, wanted, rel_tol=1e-5, abs_tol=1e-4)
            assert is_greedy == wanted_greedy


def of_any_length(engine: Engine) -> Any:
    prompts = [list(range(70)), [3, 4]]
    return engine.generate_batch(prompts, GREEDY), engine.loglikelihood(REQUESTS)


def test_long_prompts_may_be_read_in_pieces(heard: dict[str, Any]) -> None:
    assert heard["window"] == heard["mistral"]
    (answers, scores), (answers_in_pieces, scores_in_pieces) = heard["whole"], heard["pieces"]
    assert answers_in_pieces == answers
    assert [total for total, _ in scores_in_pieces] == pytest.approx([total for total, _ in scores])
