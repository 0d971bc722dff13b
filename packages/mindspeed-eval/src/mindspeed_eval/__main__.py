"""The `mindspeed-eval` command."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from mindspeed_core.cli import command_line, console, run

if TYPE_CHECKING:
    from mindspeed_core.generate.engine import Engine
    from mindspeed_eval.suites import Part

app = command_line("mindspeed-eval", "Measure a model on public benchmarks, with lm-eval and local data.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command("run")
def run_suites(
    model: Annotated[
        Path, typer.Argument(help="Any checkpoint: Hugging Face, Megatron or native folder, or the folder of a run.")
    ],
    tasks: Annotated[str, typer.Option(help="Suites, or subjects of one, with commas between: mmlu,bbh_navigate.")],
    data: Annotated[Path, typer.Option(help="Folder with one folder per suite, files as they were published.")],
    output: Annotated[Path, typer.Option(help="Folder for results.json and a file of samples per suite.")],
    limit: Annotated[Optional[int], typer.Option(min=1, help="Only the first N questions of each subject.")] = None,  # noqa: UP045 (typer on Python 3.10)
    shots: Annotated[Optional[int], typer.Option(min=0, help="Worked examples; by default lm-eval's number.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that go through the model together.")] = 8,
    tp: Annotated[int, typer.Option(min=1, help="Cut every layer over this many ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Cut the layers into this many stages.")] = 1,
    device: Annotated[str, typer.Option(help="auto, npu, cuda or cpu.")] = "auto",
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Of the weights; by default the checkpoint's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Folder with config.json and tokenizer, for a checkpoint that carries none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a model the questions of one or more suites."""
    from mindspeed_core.launch import run_ranks
    from mindspeed_eval import suites

    # before ranks are started and weights loaded: is all there that is asked for?
    parts = suites.load(data, suites.choose([name.strip() for name in tasks.split(",") if name.strip()]))
    output.mkdir(parents=True, exist_ok=True)

    def main() -> None:
        from mindspeed_core.generate.engine import Engine

        engine = Engine.open(model, tp=tp, pp=pp, device=device, dtype=dtype, config=config)
        if not engine.mesh.is_main:
            engine.follow()
            return
        with engine:
            asked = {"limit": limit, "shots": shots, "batch_size": batch_size, "tp": tp, "pp": pp, "dtype": dtype}
            _evaluate(engine, parts, output, {"model": str(model), "data": str(data), **asked}, as_json=as_json)

    run_ranks(main, tp * pp)


@app.command("list")
def list_suites(
    data: Annotated[Optional[Path], typer.Option(help="Also say what is found here.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """List the suites and the files each of them reads."""
    from mindspeed_core.errors import InputError
    from mindspeed_eval import suites

    listed: dict[str, dict[str, Any]] = {}
    for suite in suites.SUITES.values():
        entry: dict[str, Any] = {
            "about": suite.about,
            "files": f"{suite.name}/{suite.pattern}",
            "subjects": suite.subjects(),
        }
        if data is not None:
            try:
                (part,) = suites.load(data, {suite.name: None})
                entry["found"] = {subject: len(splits["test"]) for subject, splits in part.rows.items()}
            except InputError as error:
                entry["found"], entry["problem"] = {}, str(error)
        listed[suite.name] = entry
    if as_json:
        print(json.dumps(listed, ensure_ascii=False, indent=2))
        return
    for name, entry in listed.items():
        print(f"{name}: {entry['about']}")
        print(f"  reads DATA/{entry['files']}")
        if data is not None:
            found, known = entry["found"], len(entry["subjects"])
            counted = f"{sum(found.values())} questions in {len(found)} of {known} subjects"
            print(f"  {entry.get('problem', counted)}")


def _evaluate(engine: Engine, parts: list[Part], output: Path, asked: dict[str, Any], *, as_json: bool) -> None:
    """Ask suite by suite; what is done is written before the next one begins."""
    from importlib.metadata import version

    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_eval import report
    from mindspeed_eval.evaluate import ask
    from mindspeed_eval.model import EngineLM

    assert engine.checkpoint is not None
    lm = EngineLM(engine, Tokenizer.load(engine.checkpoint.assets), batch_size=asked["batch_size"])
    about = {
        **asked,
        "protocol": "lm-eval",
        "versions": {name: version(name) for name in ("mindspeed-eval", "lm-eval", "torch")},
    }
    outcomes, seconds, results = [], {}, {}
    for part in parts:
        start = time.monotonic()
        found, known = len(part.rows), len(part.suite.subjects())
        console.print(f"{part.suite.name}: {found} of {known} subjects")
        outcomes.append(ask(lm, part, limit=asked["limit"], shots=asked["shots"]))
        seconds[part.suite.name] = round(time.monotonic() - start, 1)
        report.write_samples(output, outcomes[-1])
        results = report.write_results(output, {**about, "seconds": seconds}, outcomes)
    if as_json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    Console(highlight=False).print(report.table(outcomes))
    console.print(f"written to {output}", style="dim")


def main() -> None:
    """Run the command line."""
    run(app)


if __name__ == "__main__":
    main()
