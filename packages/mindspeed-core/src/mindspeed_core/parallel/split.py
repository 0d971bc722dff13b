"""Why a model cannot be split in a certain way: the rules that recipes and conversion share, in the words of each."""

from __future__ import annotations

from mindspeed_core.models.family import Architecture
from mindspeed_core.parallel.pipeline import Name, Placement


def recipe_key(key: str, value: object) -> str:
    """Name a setting as a recipe does."""
    return f"parallel.{key}={value}"


def command_option(key: str, value: object) -> str:
    """Name a setting as a command line does."""
    return f"--{key.replace('_', '-')} {value}"


def split_problems(arch: Architecture, *, tp: int, placement: Placement, name: Name) -> list[str]:
    """Return what keeps a model of this architecture from being split so; one line for each rule that is broken."""
    found = []
    for what, size in (
        ("num_attention_heads", arch.num_heads),
        ("num_key_value_heads", arch.num_query_groups),
        ("intermediate_size", arch.ffn_hidden_size),
    ):
        if size % tp:
            found.append(f"{name('tp', tp)} does not divide {what}={size}; use {_divisors(size)}")
    return found + placement.problems(name)


def _divisors(size: int) -> str:
    found = [str(n) for n in range(1, size + 1) if size % n == 0]
    return " or ".join(found[:6])
