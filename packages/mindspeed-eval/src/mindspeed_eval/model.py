"""A model of ours as lm-eval sees one: it scores continuations and writes texts until a stop word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mindspeed_core.cli import console, progress
from mindspeed_core.errors import InputError
from mindspeed_core.generate.engine import Engine
from mindspeed_core.generate.sampling import SamplingConfig
from mindspeed_core.tokenizer import TextStream, Tokenizer

Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class EngineLM(TemplateLM):
    """lm-eval's questions go to an engine. Texts are tokenised, cut and stopped as lm-eval's own `hf` model does it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, batch_size: int = 8) -> None:
        super().__init__()
        self.engine = engine
        self.texts = tokenizer
        self.batch_size = batch_size
        first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        if first is None:
            raise InputError(
                f"{tokenizer.folder}: this tokenizer names neither BOS nor EOS, and texts without a context begin with one; "
                "set eos_token in its tokenizer_config.json"
            )
        self._first = first
        self._said: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        return self._first if self.texts.eos is None else self.texts.eos

    @property
    def prefix_token_id(self) -> int:
        return self._first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.texts.token_of(self._first) or "\0")
        return list(self.texts.backend.encode(string, add_special_tokens=add_special_tokens).ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        with progress(len(requests), "scoring", unit="continuations") as shown:
            return self.engine.loglikelihood(
                [(context, continuation) for _, context, continuation in requests],
                batch_size=self.batch_size,
                progress=shown.advance,
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self._first,
                max_seq_len=self.engine.max_positions,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[str, list[int]] = {}  # only like settings go through the model together
        arguments: list[Any] = [request.args for request in requests]  # (context, settings)
        for number, (_context, settings) in enumerate(arguments):
            groups.setdefault(repr(settings), []).append(number)
        answers: dict[int, str] = {}
        with progress(len(requests), "writing", unit="answers") as shown:
            for numbers in groups.values():
                settings = arguments[numbers[0]][1]
                prompts = {number: self.tok_encode(arguments[number][0]) for number in numbers}
                numbers.sort(key=lambda number: -len(prompts[number]))  # rows of like length beside each other
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    texts = self._write([prompts[number] for number in batch], settings)
                    answers.update(zip(batch, texts, strict=True))
                    shown.advance(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _write(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        """Return what follows each prompt, up to the first stop word."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, 256))
        end = self.texts.decode([self.eot_token_id], skip_special=False)
        stops = [stop for stop in handle_stop_sequences(wanted["until"], eos=end) if stop]
        longest = wanted["max_gen_toks"]
        if longest >= self.engine.max_positions:  # lm-eval's own model gives up here
            longest = self.engine.max_positions // 2
            self._say_once(
                f"answers end after {longest} tokens, not {wanted['max_gen_toks']}: "
                f"the model reads no more than {self.engine.max_positions}"
            )
        room = self.engine.max_positions - longest
        if any(len(prompt) > room for prompt in prompts):
            self._say_once(f"prompts lose their beginning: only {room} tokens fit before an answer of up to {longest}")
        sampling = SamplingConfig(
            temperature=wanted.get("temperature", 0.0) if wanted["do_sample"] else 0.0,
            top_k=wanted.get("top_k") or 0,
            top_p=wanted.get("top_p") or 1.0,
            max_new_tokens=longest,
        )
        tails = [_Tail(TextStream(self.texts), stops) for _ in prompts]
        rows = self.engine.generate_batch(
            [prompt[-room:] for prompt in prompts],
            sampling,
            [self.eot_token_id],
            finished=lambda row, tokens: tails[row].holds_stop(tokens[-1]),
        )
        return [postprocess_generated_text(self.texts.decode(row), stops, None) for row in rows]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            console.print(text, style="yellow")


class _Tail:
    """The end of a text that is being written, long enough to see a stop word in it."""

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        self._stream, self._stops = stream, stops
        self._length = max(map(len, stops), default=0)
        self._text = ""

    def holds_stop(self, token: int) -> bool:
        new = self._stream.push(token)
        text = self._text + new
        self._text = text[-self._length :] if self._length else ""
        return any(stop in text for stop in self._stops)
