"""The `mindspeed-core` command."""

from __future__ import annotations

from typing import Annotated

import typer

from mindspeed_core.cli import command_line, run

app = command_line("mindspeed-core", "What every part of the toolchain stands on. `doctor` checks this machine.")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check versions, device, CANN, Megatron and collectives; name the mend of every fault. Exits with 2 on a fault."""
    import dataclasses
    import json

    from mindspeed_core.doctor import examine, lines

    findings = examine()
    print(json.dumps(dataclasses.asdict(findings), indent=2) if as_json else "\n".join(lines(findings)))
    if findings.problems:
        raise typer.Exit(2)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
