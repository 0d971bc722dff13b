"""The model families, by name, and how a configuration finds its own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mindspeed_core.errors import InputError
from mindspeed_core.models.families.baichuan import BAICHUAN
from mindspeed_core.models.families.deepseek2 import DEEPSEEK2
from mindspeed_core.models.families.deepseek3 import DEEPSEEK3
from mindspeed_core.models.families.llama import LLAMA
from mindspeed_core.models.families.mistral import MISTRAL
from mindspeed_core.models.families.mixtral import MIXTRAL
from mindspeed_core.models.families.qwen import QWEN2, QWEN3
from mindspeed_core.models.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, DEEPSEEK2, DEEPSEEK3, BAICHUAN)
}


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """Return the family that declares the configuration's `architectures` entry."""
    classes = config.get("architectures") or []
    for family in FAMILIES.values():
        if any(name in family.hf_classes for name in classes):
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.hf_classes)
    raise InputError(f"{where}: architectures={classes} is no model this version knows; it knows {known}")


def preset(name: str) -> dict[str, Any]:
    """Return the config.json of a named size, such as `qwen3-0.6b`."""
    sizes = {key: config for family in FAMILIES.values() for key, config in family.sizes.items()}
    if name not in sizes:
        near = difflib.get_close_matches(name, sizes, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(sizes))}"
        raise InputError(f"model.preset={name}: no such preset; {hint}")
    return dict(sizes[name])
