"""The `mindspeed-serve` command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from mindspeed_core.cli import command_line, console, run

if TYPE_CHECKING:
    from mindspeed_core.generate.engine import Engine
    from mindspeed_core.generate.sampling import SamplingConfig

app = command_line("mindspeed-serve", "Generate text and chat, in the terminal and on a web page.")

Model = Annotated[
    Path, typer.Argument(help="Any checkpoint: Hugging Face, Megatron or native folder, or the folder of a run.")
]
Tp = Annotated[int, typer.Option(min=1, help="Cut every layer over this many ranks.")]
Pp = Annotated[int, typer.Option(min=1, help="Cut the layers into this many stages.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, npu, cuda or cpu.")]
Dtype = Annotated[Optional[Literal["fp32", "bf16"]], typer.Option(help="Of the weights; by default the checkpoint's.")]  # noqa: UP045
Config = Annotated[
    Optional[Path],  # noqa: UP045 (typer on Python 3.10)
    typer.Option(help="Folder with config.json and tokenizer, for a checkpoint that carries none."),
]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token; higher is more varied.")]
TopK = Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability; 1: from all.")]
Seed = Annotated[Optional[int], typer.Option(help="Repeat the same draws.")]  # noqa: UP045
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")]
Template = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--template", help="Chat template: qwen, llama2, llama3, ...; by default the tokenizer's own."),
]
System = Annotated[Optional[str], typer.Option(help="Instruction that stands before every conversation.")]  # noqa: UP045


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty starts from BOS, - reads stdin.")] = "",
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    tp: Tp = 1,
    pp: Pp = 1,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    config: Config = None,
) -> None:
    """Continue a text: the continuation goes to stdout as it is made, and nothing else does."""
    sampling = _sampling(temperature, top_k, top_p, seed, max_new_tokens)

    def work(engine: Engine) -> None:
        from mindspeed_serve.terminal import continue_text

        continue_text(engine, prompt, sampling)

    _on_ranks(work, model, tp=tp, pp=pp, device=device, dtype=dtype, config=config)


@app.command()
def chat(
    model: Model,
    template: Template = None,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 50,
    top_p: TopP = 0.95,
    seed: Seed = None,
    tp: Tp = 1,
    pp: Pp = 1,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    config: Config = None,
) -> None:
    """Chat in the terminal, or answer the lines of a pipe."""
    sampling = _sampling(temperature, top_k, top_p, seed, max_new_tokens)
    check = _template_check(model, template, config)

    def work(engine: Engine) -> None:
        from mindspeed_serve.assistant import Assistant
        from mindspeed_serve.terminal import Chat

        Chat(Assistant.of(engine, template), sampling, system=system).run()

    _on_ranks(work, model, tp=tp, pp=pp, check=check, device=device, dtype=dtype, config=config)


@app.command()
def web(
    model: Model,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1 is seen by this machine alone.")
    ] = "127.0.0.1",
    template: Template = None,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 50,
    top_p: TopP = 0.95,
    seed: Seed = None,
    tp: Tp = 1,
    pp: Pp = 1,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    config: Config = None,
) -> None:
    """Serve a chat page; its address is printed when it is ready."""
    sampling = _sampling(temperature, top_k, top_p, seed, max_new_tokens)
    check = _template_check(model, template, config)

    def work(engine: Engine) -> None:
        from mindspeed_serve.assistant import Assistant
        from mindspeed_serve.web import serve

        serve(Assistant.of(engine, template), sampling, system=system or "", host=host, port=port)

    from mindspeed_core import launch
    from mindspeed_serve.address import check_free

    if not launch.launched():
        check_free(host, port)
    _on_ranks(work, model, tp=tp, pp=pp, check=check, device=device, dtype=dtype, config=config)


def _sampling(temperature: float, top_k: int, top_p: float, seed: int | None, max_new_tokens: int) -> SamplingConfig:
    from mindspeed_core.generate.sampling import SamplingConfig

    return SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens)


def _template_check(model: Path, name: str | None, config: Path | None) -> Callable[[], None]:
    """Return what refuses, before minutes of loading weights, a chat template that the model's tokenizer cannot write."""
    from mindspeed_core.templates import template

    chosen = template(name)

    def check() -> None:
        from mindspeed_core.checkpoint import open_checkpoint
        from mindspeed_core.tokenizer import Tokenizer

        chosen.check(Tokenizer.load(open_checkpoint(model, config=config).assets))

    return check


def _on_ranks(
    work: Callable[[Engine], None],
    model: Path,
    *,
    tp: int,
    pp: int,
    check: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    """Open the model on tp x pp ranks and do the work on the first of them, if the check there finds no fault."""
    from mindspeed_core.launch import run_ranks, world

    def main() -> None:
        from mindspeed_core.generate.engine import Engine

        if check is not None and world()[0] == 0:
            check()
        with console.status(f"loading {model}"):
            engine = Engine.open(model, tp=tp, pp=pp, **options)
        if not engine.mesh.is_main:
            engine.follow()
            return
        with engine:
            work(engine)

    run_ranks(main, tp * pp)


def main() -> None:
    """Run the command line."""
    run(app)


if __name__ == "__main__":
    main()
