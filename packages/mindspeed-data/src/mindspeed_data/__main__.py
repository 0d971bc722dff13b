"""The `mindspeed-data` command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mindspeed_core.cli import command_line, run
from mindspeed_core.errors import InputError

if TYPE_CHECKING:
    from mindspeed_data.arrange import Mix
    from mindspeed_data.formats import Format
    from mindspeed_data.plan import Plan
    from mindspeed_data.tokenize import Job

app = command_line("mindspeed-data", "Text and instructions into data sets for training, in Megatron's format.")

Inputs = Annotated[
    list[Path],
    typer.Argument(help="Files (txt, jsonl, json, csv, also .gz or .zst, parquet, arrow), folders of them, patterns."),
]
TokenizerFolder = Annotated[Path, typer.Option("--tokenizer", help="Folder of the tokenizer, or of a model.")]
Output = Annotated[Path, typer.Option("--output", help="Beginning of the names of the files to write, say data/wiki.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes; what cores and input are worth if not given.")
]
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
Shard = Annotated[
    str | None, typer.Option("--shard", help="i/n: the i-th of n shares of the input; merge joins the shards.")
]
Mixing = Annotated[
    Literal["concat", "first_exhausted", "all_exhausted"],
    typer.Option("--mix", help="Inputs one after the other, or mixed until the first, or every one, has been seen."),
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="How often each input is drawn when mixed: 7,3; in turn if not given.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of the draws of --mix; 1234 if not given.")]
AppendEod = Annotated[bool, typer.Option("--append-eod", help="End every document, or conversation, with a token.")]
EodToken = Annotated[str | None, typer.Option("--eod-token", help="That token; the tokenizer's EOS if not given.")]
MaxLength = Annotated[int | None, typer.Option("--seq-length", min=2, help="Leave out samples of more tokens.")]
THINKING = {"keep": None, "learn": True, "drop": False}


@app.command()
def pretrain(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: Output,
    workers: Workers = None,
    append_eod: AppendEod = False,
    eod_token: EodToken = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every document with BOS.")] = False,
    dtype: Annotated[Literal["int32", "uint16"], typer.Option("--dtype", help="How ids are stored.")] = "int32",
    json_key: Annotated[str | None, typer.Option("--json-key", help="The key that holds the text.")] = None,
    map_keys: MapKeys = None,
    per_line: Annotated[bool, typer.Option("--per-line", help="A document per line of a txt, not per file.")] = False,
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="One sequence per sentence, documents as groups of them.")
    ] = False,
    language: Annotated[
        str, typer.Option("--language", help="Whose abbreviations end no sentence: en, de, fr ...")
    ] = "en",
    keep_newlines: Annotated[
        bool, typer.Option("--keep-newlines", help="Keep blanks and newlines at the end of each sentence.")
    ] = False,
    shard: Shard = None,
    mix: Mixing = "concat",
    weights: Weights = None,
    seed: Seed = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Text into OUTPUT_text_document.bin and .idx, one sequence per document, or into OUTPUT_text_sentence."""
    import numpy as np

    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_data import formats
    from mindspeed_data.sentences import SentenceJob, check_language
    from mindspeed_data.sources import find
    from mindspeed_data.tokenize import TextJob

    if split_sentences:
        check_language(language)
        if mix != "concat":
            raise InputError("--split-sentences: mixes no inputs; write each on its own and mix them in the recipe")
    elif keep_newlines or language != "en":
        raise InputError("--keep-newlines and --language: are of --split-sentences alone; add it")
    if json_key is not None and map_keys is not None:
        raise InputError(f"--json-key {json_key}: beside --map-keys, which names the same key; leave one of them out")
    keys = _keys(map_keys) if json_key is None else {"text": json_key}
    sources = find(inputs, per_line=per_line)
    if per_line and all(source.kind != "lines" for source in sources):
        raise InputError("--per-line: is of txt alone, and none of the inputs is one; leave it out")
    loaded = Tokenizer.load(tokenizer)
    if dtype == "uint16" and loaded.vocab_size > 1 << 16:
        raise InputError(f"--dtype uint16 holds ids below 65,536, and {tokenizer} has {loaded.vocab_size:,}; use int32")
    if bos and loaded.bos is None:
        raise InputError(f"--bos: the tokenizer in {tokenizer} has no BOS token")
    of_text: dict[str, Any] = {
        "sources": sources,
        "tokenizer": loaded,
        "format": formats.TEXT,
        "keys": formats.TEXT.mapped(keys),
        "fast": False,
        "dtype": np.dtype(dtype),
        "bos": loaded.bos if bos else None,
        "eod": _eod(loaded, append_eod, eod_token),
    }
    if split_sentences:
        job = SentenceJob(**of_text, language=language, keep_newlines=keep_newlines)
    else:
        job = TextJob(**of_text)
    plan = _plan(inputs, shard, mix, weights, seed)
    _write(job, output, plan, workers=workers, overwrite=overwrite, strict=strict)


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
    seq_length: Annotated[
        int | None, typer.Option("--seq-length", min=2, help="The most tokens of a sample, or of a packed sequence.")
    ] = None,
    longer: Annotated[
        Literal["drop", "cut", "split"],
        typer.Option("--longer", help="What becomes of longer rows: left out, cut, or several samples."),
    ] = "drop",
    append_eod: AppendEod = False,
    eod_token: EodToken = None,
    pack: Annotated[bool, typer.Option("--pack", help="Fill sequences of --seq-length with several samples.")] = False,
    pack_window: Annotated[
        int | None, typer.Option("--pack-window", min=1, help="Samples that are packed together; all if not given.")
    ] = None,
    workers: Workers = None,
    map_keys: MapKeys = None,
    shard: Shard = None,
    mix: Mixing = "concat",
    weights: Weights = None,
    seed: Seed = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Questions and answers into OUTPUT_packed_{input_ids,attention_mask,labels}_document, one sequence per sample."""
    from mindspeed_data.conversations import CONVERSATIONS
    from mindspeed_data.tokenize import InstructionJob

    rows = _rows(inputs, tokenizer, CONVERSATIONS[format], map_keys, template, thinking)
    job = InstructionJob(
        **rows,
        learn=learn,
        seq_length=seq_length,
        longer=longer,
        eod=_eod(rows["tokenizer"], append_eod, eod_token),
    )
    if pack and seq_length is None:
        raise InputError("--pack: how long the sequences are is missing; add --seq-length")
    if longer != "drop" and seq_length is None:
        raise InputError(f"--longer {longer}: longer than what is missing; add --seq-length")
    if pack_window is not None and not pack:
        raise InputError("--pack-window: is of --pack alone; add it")
    plan = _plan(inputs, shard, mix, weights, seed, pack=seq_length if pack else None, window=pack_window)
    _write(job, output, plan, workers=workers, overwrite=overwrite, strict=strict)


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
    shard: Shard = None,
    mix: Mixing = "concat",
    weights: Weights = None,
    seed: Seed = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Questions with a better and a worse answer into OUTPUT_packed_{chosen,rejected}_{input_ids,labels}_document."""
    from mindspeed_data.pairwise import PAIRS, PairwiseJob

    job = PairwiseJob(**_rows(inputs, tokenizer, PAIRS[format], map_keys, template, thinking), seq_length=seq_length)
    plan = _plan(inputs, shard, mix, weights, seed)
    _write(job, output, plan, workers=workers, overwrite=overwrite, strict=strict)


@app.command()
def prm(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: Output,
    format: Annotated[
        Literal["placeholder", "math-shepherd", "stepwise", "prmbench"],
        typer.Option("--format", help="What the rows are."),
    ] = "placeholder",
    placeholder: Annotated[str, typer.Option("--placeholder", help="What ends a step; one token.")] = "ки",
    reward_tokens: Annotated[
        str, typer.Option("--reward-tokens", help="What steps are worth, the best first; one token each.")
    ] = "+ -",
    seq_length: MaxLength = None,
    workers: Workers = None,
    map_keys: MapKeys = None,
    shard: Shard = None,
    mix: Mixing = "concat",
    weights: Weights = None,
    seed: Seed = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Solutions in steps that are good or bad into OUTPUT_packed_{input_ids,attention_mask,labels}_document."""
    from mindspeed_data.process_reward import Marks, ProcessRewardJob, process_rewards, token_ids

    marks = Marks(placeholder, tuple(reward_tokens.split()))
    job = ProcessRewardJob(
        **_rows(inputs, tokenizer, process_rewards(marks)[format], map_keys), marks=marks, seq_length=seq_length
    )
    token_ids(marks, job.tokenizer)
    plan = _plan(inputs, shard, mix, weights, seed)
    _write(job, output, plan, workers=workers, overwrite=overwrite, strict=strict)


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
def stats(
    prefix: Annotated[Path, typer.Argument(help="Prefix of a data set, as --output gave it.")],
    seq_length: Annotated[
        list[int] | None,
        typer.Option("--seq-length", min=2, help="Sequences to be filled by packing; may be given several times."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of text.")] = False,
) -> None:
    """How long the samples are, and how full sequences become when they are packed."""
    from mindspeed_data import stats as numbers

    told = numbers.stats(prefix, seq_lengths=tuple(seq_length or ()))
    print(json.dumps(told) if as_json else numbers.table(prefix, told))


@app.command()
def merge(
    prefixes: Annotated[list[Path], typer.Argument(help="Data sets to join, or P alone for its shards P-i-of-n.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Prefix of the whole; P itself for the shards of P.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Join data sets that were made alike: the shards of --shard, or others."""
    from mindspeed_data.merge import merge as merge_files
    from mindspeed_data.merge import shards_of

    if len(prefixes) == 1:
        whole, prefixes = prefixes[0], shards_of(prefixes[0])
    elif output is None:
        raise InputError("--output: how the whole is to be called is missing")
    else:
        whole = output
    merge_files(prefixes, output or whole, overwrite=overwrite)
    print(output or whole)


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
    from mindspeed_data.sources import find

    keys = format.mapped(_keys(map_keys))
    chosen = None if thinking is None else templates.template(template, thinking=THINKING[thinking])
    sources = find(inputs)
    loaded = Tokenizer.load(tokenizer)
    job = {"sources": sources, "tokenizer": loaded, "format": format, "keys": keys, "fast": False}
    if chosen is None:
        return job
    chosen.check(loaded)
    return {**job, "template": chosen}


def _plan(
    inputs: list[Path],
    shard: str | None,
    mix: Mix,
    weights: str | None,
    seed: int | None,
    *,
    pack: int | None = None,
    window: int | None = None,
) -> Plan:
    """The options that say which rows are written, in which order and how they share sequences."""
    from mindspeed_data.plan import Plan

    try:
        shares = tuple(float(part) for part in weights.split(",")) if weights is not None else None
    except ValueError:
        shares = ()
    if shares is not None and mix == "concat":
        raise InputError(
            "--weights: inputs are drawn by weight when they are mixed; add --mix first_exhausted or all_exhausted"
        )
    if seed is not None and mix == "concat":
        raise InputError("--seed: is of the draws of --mix alone; add --mix first_exhausted or all_exhausted")
    if shares is not None and not (len(shares) == len(inputs) and min(shares) > 0 and math.isfinite(sum(shares))):
        raise InputError(f"--weights {weights}: a number above 0 for each of the {len(inputs)} inputs is expected")
    given = re.fullmatch(r"(\d+)/(\d+)", shard or "1/1")
    number, shards = (int(given[1]), int(given[2])) if given else (0, 0)
    if not 1 <= number <= shards <= 99999:
        raise InputError(f"--shard {shard}: i/n is expected, with i from 1 to n, like 1/8")
    if shards > 1 and mix != "concat":
        raise InputError("--shard: shares of inputs cannot be mixed; write each input on its own and mix in the recipe")
    drawn = {} if seed is None else {"seed": seed}
    return Plan(shard=(number, shards), mix=mix, weights=shares, pack=pack, window=window, **drawn)


def _write(job: Job, output: Path, plan: Plan, *, workers: int | None, overwrite: bool, strict: bool) -> None:
    """Write the data set of a job and print its prefix: of one of several shards its own."""
    from mindspeed_data import preprocess
    from mindspeed_data.merge import shard_prefix
    from mindspeed_data.sidecar import check_alone

    prefix = output if plan.shard == (1, 1) else shard_prefix(output, plan.shard)
    check_alone(prefix, job.outputs)
    preprocess.run(job, prefix, plan=plan, workers=workers, overwrite=overwrite, strict=strict)
    print(prefix)


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


def _eod(tokenizer: Any, append: bool, token: str | None) -> int | None:
    """The id of the end-of-document token; None where none is to be written."""
    if not append and token is None:
        return None
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
