"""Write two tables into docs/parallelism.md: `python scripts/parallelism_table.py`.

What is not exact, as `mindspeed-train verify` leaves it out. And what combines with what: each cell is what the rules of a recipe say to two features at once on a small model: the page cannot promise more, nor
less, than `mindspeed-train` lets start. A feature that is refused on its own is left out.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/parallelism.md"
BEGIN, END = "<!-- made by scripts/parallelism_table.py -->", "<!-- end of what it made -->"

DENSE = {"preset": "mistral-7b-v0.3", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
EXPERTS = {"preset": "mixtral-8x7b", "num_hidden_layers": 4}
BASE: dict[str, Any] = {
    "model": DENSE,
    "data": {"train": "text", "tokenizer": "tokenizer", "seq_length": 256},
    "batch": {"micro": 1, "global": 16},
    "train": {"steps": 1},
    "checkpoint": {"folder": "run"},
}
# What the page calls a feature, and the sections of a recipe that ask for it (and for what it cannot do without).
FEATURES: dict[str, dict[str, Any]] = {
    "tp": {"parallel": {"tp": 2}},
    "sp": {"parallel": {"tp": 2, "sp": True}},
    "coc": {"parallel": {"tp": 2, "sp": True, "collective_matmul": "coc"}},
    "mc2": {"parallel": {"tp": 2, "sp": True, "collective_matmul": "mc2"}},
    "pp": {"parallel": {"pp": 2}},
    "delay": {"parallel": {"pp": 2, "delay_weight_gradients": True}},
    "vpp": {"parallel": {"pp": 2, "vpp": 2}},
    "layers per stage": {"parallel": {"pp": 2, "layers_per_stage": [3, 1]}},
    "noop layers": {"parallel": {"pp": 2, "noop_layers": [0, 1, 6, 7]}},
    "ring": {"parallel": {"cp": 2, "cp_algorithm": "ring"}},
    "ulysses": {"parallel": {"cp": 2, "cp_algorithm": "ulysses"}},
    "hybrid": {"parallel": {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}},
    "window": {"model": {"sliding_window": 128}},
    "ep": {"model": EXPERTS, "parallel": {"dp": 2, "ep": 2}},
    "etp": {"model": EXPERTS, "parallel": {"tp": 2, "sp": True, "etp": 2}},
    "distributed": {"parallel": {"dp": 2}, "optim": {"distributed": True}},
    "overlap reduce": {"parallel": {"dp": 2}, "optim": {"overlap_grad_reduce": True}},
    "overlap gather": {
        "parallel": {"dp": 2},
        "optim": {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    "fused accumulation": {"optim": {"fused_accumulation": True}},
    "recompute full": {"memory": {"recompute": "full", "recompute_layers": 1}},
    "recompute selective": {"memory": {"recompute": "selective"}},
    "recompute norm": {"memory": {"recompute_norm": True}},
    "recompute activation": {"memory": {"recompute_activation": True}},
    "swap": {"memory": {"swap_attention": True}},
    "reuse fp32": {"precision": "bf16", "optim": {"reuse_fp32_param": True}},
    "bf16 states": {"precision": "bf16", "optim": {"bf16_states": True}},
    "pack": {"data": {"pack": True}},
}
YES, NEVER = "yes", "–"  # NEVER: both say the same key, each another value


def table() -> str:
    """Return the table and its notes in Markdown."""
    names = [name for name, sections in FEATURES.items() if not refused(sections)]
    notes: list[str] = []
    lines = ["| | " + " | ".join(names[:-1]) + " |", "|---|" + "---|" * (len(names) - 1)]
    for place, name in enumerate(names[1:], 1):
        cells = [_cell(name, other, notes) for other in names[:place]]
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |" + " |" * (len(names) - 1 - place))
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]).rstrip() + "\n"


def _cell(one: str, other: str, notes: list[str]) -> str:
    both = joined(FEATURES[one], FEATURES[other])
    if both is None:
        return NEVER
    reasons = refused(both)
    for reason in reasons:
        if reason not in notes:
            notes.append(reason)
    return " ".join(str(notes.index(reason) + 1) for reason in reasons) or YES


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Return the sections that ask for both features; None where they want the same key in two ways."""
    both = {name: dict(section) if isinstance(section, dict) else section for name, section in one.items()}
    for name, section in other.items():
        mine = both.setdefault(name, section)
        if not isinstance(section, dict):
            if mine != section:
                return None
        elif any(mine.get(key, value) != value for key, value in section.items()):
            return None
        else:
            both[name] = {**mine, **section}
    return both


def refused(sections: dict[str, Any]) -> list[str]:
    """Return why a recipe with these sections cannot run, in the sentences of the rules; empty if it can."""
    from pydantic import ValidationError

    from mindspeed_core.errors import InputError
    from mindspeed_core.models.families import family_of
    from mindspeed_train import rules
    from mindspeed_train.config import Recipe

    values = {name: {**section} for name, section in BASE.items()}
    for name, section in sections.items():
        if isinstance(section, dict) and "preset" not in section:
            section = {**values.get(name, {}), **section}
        values[name] = section
    try:
        recipe = Recipe.model_validate(values)
        config = recipe.model.config()
        arch = family_of(config, where="model").architecture(config)
    except ValidationError as error:
        return [_sentence(line) for fault in error.errors() for line in fault["msg"].splitlines()]
    except InputError as error:
        return [str(error)]
    case = rules.Case(
        recipe=recipe, dp=recipe.parallel.dp or 1, arch=arch, length=recipe.data.seq_length or 0, varies=False
    )
    return list(dict.fromkeys(rule.says for rule, _line in rules.broken(case)))


def _sentence(fault: str) -> str:
    return re.sub(r"^Value error, ", "", fault)


def inexact() -> str:
    """Return what does not equal one process, when, and why, in Markdown."""
    from mindspeed_train.exactness import DEPARTURES

    rows = [f"| `{row.name}` | {row.when} | {row.why} |" for row in DEPARTURES]
    return "\n".join(["| key | differs from one process | since |", "|---|---|---|", *rows]) + "\n"


def write(page: str) -> str:
    """Return the page with fresh tables, in the order in which they stand there."""
    parts = re.split(f"{re.escape(BEGIN)}.*?{re.escape(END)}", page, flags=re.DOTALL)
    whole = parts[0]
    for made, after in zip((table(), inexact()), parts[1:], strict=True):
        whole += f"{BEGIN}\n\n{made}\n{END}{after}"
    return whole


def main() -> None:
    PAGE.write_text(write(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    left_out = {name: refused(sections) for name, sections in FEATURES.items() if refused(sections)}
    for name, reasons in left_out.items():
        sys.stderr.write(f"left out: {name}: {'; '.join(reasons)}\n")


if __name__ == "__main__":
    main()
