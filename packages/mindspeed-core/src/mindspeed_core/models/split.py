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


def split_problems(
    arch: Architecture, *, tp: int, placement: Placement, name: Name, ep: int = 1, etp: int | None = None
) -> list[str]:
    """Return what keeps a model of this architecture from being split so; one line for each rule that is broken."""
    found = []
    widths = [
        ("num_attention_heads", arch.num_heads),
        ("num_key_value_heads", arch.num_query_groups),
    ]
    if not all(map(arch.has_experts, range(arch.num_layers))):
        widths.append(("intermediate_size", arch.ffn_hidden_size))
    if arch.shared_experts:
        widths.append(("the width of the shared experts", arch.dimension("sf")))
    for what, size in widths:
        if size % tp:
            found.append(f"{name('tp', tp)} does not divide {what}={size}; use {_divisors(size)}")
    if arch.experts is not None and arch.experts.ffn_hidden_size % (etp or tp):
        told = name("tp", tp) if etp is None else name("etp", etp)  # where only tp was written it cuts the experts too
        width = arch.experts.ffn_hidden_size
        found.append(f"{told} does not divide the width of an expert, {width}; use {_divisors(width)}")
    if arch.experts is None and etp is not None:
        found.append(f"{name('etp', etp)}: the model has no experts; leave it out")
    return found + dealing_problems(arch, ep=ep, name=name) + placement.problems(name)


def dealing_problems(arch: Architecture, *, ep: int, name: Name) -> list[str]:
    """Return what keeps the experts of a layer from being dealt to so many ranks."""
    if arch.experts is None:
        return [f"{name('ep', ep)}: the model has no experts; use 1"] if ep > 1 else []
    count = arch.experts.count
    if count % ep == 0:
        return []
    return [f"{name('ep', ep)} does not divide the {count} experts of a layer; use {_divisors(count)}"]


def _divisors(size: int) -> str:
    found = [str(n) for n in range(1, size + 1) if size % n == 0]
    return " or ".join(found[:6])
