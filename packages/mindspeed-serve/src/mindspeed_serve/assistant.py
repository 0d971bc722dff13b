"""Text to text: an engine with the tokenizer and the chat template of its model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from mindspeed_core.checkpoint.folder import read_json
from mindspeed_core.errors import InputError
from mindspeed_core.generate.engine import Engine
from mindspeed_core.generate.sampling import SamplingConfig
from mindspeed_core.templates import Message, template
from mindspeed_core.tokenizer import TextStream, Tokenizer


class Assistant:
    """Continues texts and answers messages, piece by piece. It lives on rank 0; the other ranks follow its engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        ends: frozenset[int] = frozenset(),
        template_name: str | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = name
        self.ends = ends  # end any text
        self.template = template(template_name)

    @classmethod
    def of(cls, engine: Engine, template_name: str | None = None) -> Assistant:
        """Return the assistant of an engine that was opened from a checkpoint, with the tokenizer beside it."""
        checkpoint = engine.checkpoint
        assert checkpoint is not None
        tokenizer = Tokenizer.load(checkpoint.assets)
        ends = end_ids(checkpoint.assets, tokenizer)
        return cls(engine, tokenizer, name=model_name(checkpoint.path), ends=ends, template_name=template_name)

    def continuation(self, text: str, sampling: SamplingConfig) -> Generator[str, None, None]:
        """Return the pieces of text that follow `text`; an empty one starts from BOS (or EOS, where there is none)."""
        ids = prompt_ids(self.tokenizer, text)
        return self._pieces(ids, sampling, self.ends)

    def fitting(self, messages: Sequence[Message], system: str | None, sampling: SamplingConfig) -> list[Message]:
        """Return the newest messages that leave room for an answer, beginning with a question. The last one always stays."""
        # half the context for the answer at most: a question must stay readable whatever max_new_tokens is
        room = min(sampling.max_new_tokens, self.engine.max_positions // 2)
        kept = list(messages)
        while len(kept) > 2 and len(self._prompt(kept, system)) > self.engine.max_positions - room:
            kept = kept[2:]
        return kept

    def reply(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, system: str | None = None
    ) -> Generator[str, None, None]:
        """Return the pieces of the answer to `messages`, of which the oldest are left out when they do not fit."""
        ids = self._prompt(self.fitting(messages, system, sampling), system)
        return self._pieces(ids, sampling, self.ends | self.template.stop_ids(self.tokenizer))

    def _prompt(self, messages: Sequence[Message], system: str | None) -> list[int]:
        try:
            return self.template.prompt(self.tokenizer, messages, system)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _pieces(self, ids: list[int], sampling: SamplingConfig, stop_ids: frozenset[int]) -> Generator[str, None, None]:
        tokens: Any = self.engine.generate(ids, sampling, stop_ids)
        return _text(tokens, TextStream(self.tokenizer, context=ids))


def _text(tokens: Any, stream: TextStream) -> Generator[str, None, None]:
    try:
        for token in tokens:
            if piece := stream.push(token):
                yield piece
        if piece := stream.finish():
            yield piece
    finally:
        tokens.close()


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text to continue: with the BOS that the tokenizer itself puts before a text, never an end."""
    ids = list(tokenizer.backend.encode(text, add_special_tokens=True).ids)
    while ids and ids[-1] == tokenizer.eos and not text.endswith(tokenizer.eos_token or "\0"):
        ids.pop()
    if ids:
        return ids
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    if start is None:
        raise InputError(
            f"an empty prompt starts from BOS or EOS, and the tokenizer in {tokenizer.folder} names neither"
        )
    return [start]


def end_ids(assets: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a text of this model: the tokenizer's EOS and what generation_config.json names."""
    ids: set[int] = set() if tokenizer.eos is None else {tokenizer.eos}
    for name in ("generation_config.json", "config.json"):
        if (assets / name).exists():
            named = read_json(assets / name).get("eos_token_id")
            ids.update(named if isinstance(named, list) else [] if named is None else [named])
    return frozenset(ids)


def model_name(path: Path) -> str:
    """Return what to call the model in a folder: the folder, and of a run the step too."""
    path = path.resolve()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name} {path.name}"
    return path.parent.name if path.name.startswith("iter_") else path.name
