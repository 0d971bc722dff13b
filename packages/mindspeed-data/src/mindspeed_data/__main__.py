"""The `mindspeed-data` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mindspeed_core.cli import command_line, run
from mindspeed_core.errors import InputError

if TYPE_CHECKING:
    from mindspeed_data.formats import Format

app = command_line("mindspeed-data", "Text and instructions into data sets for training, in Megatron's format.")

Inputs = Annotated[list[Path], typer.Argument(help="Files (txt, jsonl, json, csv, parquet) or folders of them.")]
TokenizerFolder = Annotated[Path, typer.Option("--tokenizer", help="Folder of the tokenizer, or of a model.")]
Output = Annotated[Path, typer.Option("--output", help="Beginning of the names of the files to write, say data/wiki.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes; as many as cores if not given.")]
MapKeys = Annotated[
    str | None, typer.Option("--map-keys", help='Other names of the keys, as JSON: \'{"text": "body"}\'.')
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")]
TemplateName = Annotated[
    str | None, typer.Option("--template", help="Chat template; the tokenizer's own if not given.")
]
Thinking = Annotated[
    Literal["keep", "learn", "drop"],
    typer.Option("--thinking", help="Thoughts: as they are; empty ones learned, too; or left out."),
]
MaxLength = Annotated[int | None, typer.Option("--seq-length", min=2, help="Leave out samples of more tokens.")]
THINKING = {"keep": None, "learn": True, "drop": False}


@app.command()
def pretrain(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: Output,
    workers: Workers = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End every document with a token.")] = False,
    eod_token: Annotated[
        str | None, typer.Option("--eod-token", help="That token; the tokenizer's EOS if not given.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every document with BOS.")] = False,
    dtype: Annotated[Literal["int32", "uint16"], typer.Option("--dtype", help="How ids are stored.")] = "int32",
    json_key: Annotated[str | None, typer.Option("--json-key", help="The key that holds the text.")] = None,
    map_keys: MapKeys = None,
    per_line: Annotated[bool, typer.Option("--per-line", help="A document per line of a txt, not per file.")] = False,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Text into OUTPUT_text_document.bin and .idx, one sequence per document."""
    import numpy as np

    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_data import formats, preprocess, readers
    from mindspeed_data.tokenize import TextJob

    keys = _keys(map_keys) | ({} if json_key is None else {"text": json_key})
    sources = readers.find(inputs, per_line=per_line)
    loaded = Tokenizer.load(tokenizer)
    if dtype == "uint16" and loaded.vocab_size > 1 << 16:
        raise InputError(f"--dtype uint16 holds ids below 65,536, and {tokenizer} has {loaded.vocab_size:,}; use int32")
    if bos and loaded.bos is None:
        raise InputError(f"--bos: the tokenizer in {tokenizer} has no BOS token")
    job = TextJob(
        sources=sources,
        tokenizer=loaded,
        format=formats.TEXT,
        keys=formats.TEXT.mapped(keys),
        fast=False,
        dtype=np.dtype(dtype),
        bos=loaded.bos if bos else None,
        eod=_eod(loaded, eod_token) if append_eod or eod_token is not None else None,
    )
    preprocess.run(job, output, workers=workers, overwrite=overwrite, strict=strict)
    print(output)


@app.command()
def sft(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: Output,
    format: Annotated[
        Literal["alpaca", "sharegpt", "openai"], typer.Option("--format", help="What the rows are.")
    ] = "alpaca",
    template: TemplateName = None,
    thinking: Thinking = "keep",
    learn: Annotated[
        Literal["answers", "last", "all"],
        typer.Option("--learn", help="Every answer, the last one alone, or everything."),
    ] = "answers",
    seq_length: MaxLength = None,
    workers: Workers = None,
    map_keys: MapKeys = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Questions and answers into OUTPUT_packed_{input_ids,attention_mask,labels}_document, one sequence per sample."""
    from mindspeed_data import preprocess
    from mindspeed_data.conversations import CONVERSATIONS
    from mindspeed_data.tokenize import InstructionJob

    job = InstructionJob(
        **_rows(inputs, tokenizer, CONVERSATIONS[format], map_keys, template, thinking),
        learn=learn,
        seq_length=seq_length,
    )
    preprocess.run(job, output, workers=workers, overwrite=overwrite, strict=strict)
    print(output)


@app.command()
def pairwise(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: Output,
    format: Annotated[
        Literal["alpaca", "sharegpt", "openai"], typer.Option("--format", help="What the rows are.")
    ] = "alpaca",
    template: TemplateName = None,
    thinking: Thinking = "keep",
    seq_length: MaxLength = None,
    workers: Workers = None,
    map_keys: MapKeys = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Questions with a better and a worse answer into OUTPUT_packed_{chosen,rejected}_{input_ids,labels}_document."""
    from mindspeed_data import preprocess
    from mindspeed_data.pairwise import PAIRS, PairwiseJob

    job = PairwiseJob(**_rows(inputs, tokenizer, PAIRS[format], map_keys, template, thinking), seq_length=seq_length)
    preprocess.run(job, output, workers=workers, overwrite=overwrite, strict=strict)
    print(output)


@app.command()
def prm(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: Output,
    format: Annotated[
        Literal["placeholder", "math-shepherd", "stepwise"], typer.Option("--format", help="What the rows are.")
    ] = "placeholder",
    placeholder: Annotated[str, typer.Option("--placeholder", help="What ends a step; one token.")] = "ки",
    reward_tokens: Annotated[
        str, typer.Option("--reward-tokens", help="What steps are worth, the best first; one token each.")
    ] = "+ -",
    seq_length: MaxLength = None,
    workers: Workers = None,
    map_keys: MapKeys = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Solutions in steps that are good or bad into OUTPUT_packed_{input_ids,attention_mask,labels}_document."""
    from mindspeed_data import preprocess
    from mindspeed_data.process_reward import Marks, ProcessRewardJob, process_rewards, token_ids

    marks = Marks(placeholder, tuple(reward_tokens.split()))
    job = ProcessRewardJob(
        **_rows(inputs, tokenizer, process_rewards(marks)[format], map_keys), marks=marks, seq_length=seq_length
    )
    token_ids(marks, job.tokenizer)
    preprocess.run(job, output, workers=workers, overwrite=overwrite, strict=strict)
    print(output)


@app.command()
def show(
    prefix: Annotated[Path, typer.Argument(help="Prefix of a data set, as --output gave it.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="The one it was made with if not given.")
    ] = None,
    start: Annotated[int, typer.Option("--start", min=0, help="The first sample to show.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many samples.")] = 3,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of each sample to show.")] = 512,
) -> None:
    """Samples as text; what is learned is green (or within « » where there is no colour)."""
    from mindspeed_data.show import show as show_samples

    show_samples(prefix, tokenizer=tokenizer, start=start, count=count, length=length)


@app.command()
def verify(prefix: Annotated[Path, typer.Argument(help="Prefix of a data set, as --output gave it.")]) -> None:
    """Read a data set from end to end and name what is wrong with it."""
    from mindspeed_data.verify import verify as verify_files

    print(verify_files(prefix))


def _rows(
    inputs: list[Path],
    tokenizer: Path,
    format: Format,
    map_keys: str | None,
    template: str | None = None,
    thinking: str | None = None,
) -> dict[str, Any]:
    """What every job on rows needs; with a chat template where `thinking` says how."""
    from mindspeed_core import templates
    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_data import readers

    keys = format.mapped(_keys(map_keys))
    chosen = None if thinking is None else templates.template(template, thinking=THINKING[thinking])
    sources = readers.find(inputs)
    loaded = Tokenizer.load(tokenizer)
    job = {"sources": sources, "tokenizer": loaded, "format": format, "keys": keys, "fast": False}
    if chosen is None:
        return job
    chosen.check(loaded)
    return {**job, "template": chosen}


def _keys(text: str | None) -> dict[str, str]:
    """The value of --map-keys; names within "tags", as the original groups them, are names like the others."""
    if text is None:
        return {}
    try:
        keys: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f'--map-keys: not valid JSON ({error}); write it like \'{{"text": "body"}}\'') from error
    if isinstance(keys, dict) and isinstance(keys.get("tags"), dict):
        tags = keys.pop("tags")
        keys = {**keys, **tags}
    if not isinstance(keys, dict) or not all(isinstance(value, str) for value in keys.values()):
        raise InputError('--map-keys: an object of names is expected, like \'{"text": "body"}\'')
    return keys


def _eod(tokenizer: Any, token: str | None) -> int:
    """The id of the end-of-document token."""
    id = tokenizer.eos if token is None else tokenizer.id_of(token)
    if id is None:
        what = (
            "it has no EOS; name a token with --eod-token" if token is None else f"{token!r} is not one of its tokens"
        )
        raise InputError(f"--append-eod: the tokenizer in {tokenizer.folder}: {what}")
    return id


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
