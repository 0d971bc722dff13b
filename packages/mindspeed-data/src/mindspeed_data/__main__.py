"""The `mindspeed-data` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mindspeed_core.cli import command_line, run
from mindspeed_core.errors import InputError

app = command_line("mindspeed-data", "Text and instructions into data sets for training, in Megatron's format.")

Inputs = Annotated[list[Path], typer.Argument(help="Files (txt, jsonl, json, csv, parquet) or folders of them.")]
TokenizerFolder = Annotated[Path, typer.Option("--tokenizer", help="Folder of the tokenizer, or of a model.")]
Output = Annotated[Path, typer.Option("--output", help="Beginning of the names of the files to write, say data/wiki.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes; as many as cores if not given.")]
MapKeys = Annotated[
    str | None, typer.Option("--map-keys", help='Other names of the keys, as JSON: \'{"text": "body"}\'.')
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")]


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
    preprocess.run(job, output, workers=workers, overwrite=overwrite)
    print(output)


@app.command()
def sft(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: Output,
    format: Annotated[str, typer.Option("--format", help="What the rows are: alpaca.")] = "alpaca",
    template: Annotated[
        str | None, typer.Option("--template", help="Chat template; the tokenizer's own if not given.")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option("--seq-length", min=2, help="Leave out samples of more tokens.")
    ] = None,
    workers: Workers = None,
    map_keys: MapKeys = None,
    overwrite: Overwrite = False,
) -> None:
    """Questions and answers into OUTPUT_packed_{input_ids,attention_mask,labels}_document, one sequence per sample."""
    from mindspeed_core import templates
    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_data import formats, preprocess, readers
    from mindspeed_data.tokenize import InstructionJob

    if format not in formats.INSTRUCTION_FORMATS:
        raise InputError(f"--format {format}: known are {', '.join(formats.INSTRUCTION_FORMATS)}")
    chosen = templates.template(template)
    keys = formats.INSTRUCTION_FORMATS[format].mapped(_keys(map_keys))
    sources = readers.find(inputs)
    loaded = Tokenizer.load(tokenizer)
    chosen.check(loaded)
    job = InstructionJob(
        sources=sources,
        tokenizer=loaded,
        format=formats.INSTRUCTION_FORMATS[format],
        keys=keys,
        fast=False,
        template=chosen,
        seq_length=seq_length,
    )
    preprocess.run(job, output, workers=workers, overwrite=overwrite)
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


def _keys(text: str | None) -> dict[str, str]:
    """The value of --map-keys."""
    if text is None:
        return {}
    try:
        keys: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f'--map-keys: not valid JSON ({error}); write it like \'{{"text": "body"}}\'') from error
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
