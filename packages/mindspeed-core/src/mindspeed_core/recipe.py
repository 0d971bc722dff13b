"""Recipes: YAML and `key=value` overrides become one frozen value, and every error is told at once.

An error is one line, `FILE:LINE: dotted.key: what is wrong; how to mend it`. Numbers are numbers as people write them
(`1e-4`), nothing else is guessed: `no` and `1:30` are text. A list of whole numbers may be written as messages write it
(`layers_per_stage=3,1`). Sections that a command does not read are named in `ignore`.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from mindspeed_core.errors import InputError

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str | int, ...]  # ("parallel", "tp"); numbers are places in a list


class Section(BaseModel):
    """Base of every recipe section: frozen, and a key it does not declare is an error.

    A check of several fields is a `model_validator(mode="after")` that raises ValueError; its message may begin with the
    dotted key it is about (`tp: does not divide the 6 heads; use 1, 2, 3 or 6`), and holds one fault per line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_a_list(cls, value: Any, info: ValidationInfo) -> Any:
        """Whole numbers with commas between, or a single one, are a list where nothing else fits."""
        if info.field_name is None or not _lists_integers(cls.model_fields[info.field_name].annotation):
            return value
        if isinstance(value, str) and _NUMBERS.fullmatch(value):
            return [int(number) for number in value.split(",")]
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts True as 1; a recipe that says `tp: true` is mistaken."""
        truths = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, bool)]
        if truths and info.field_name is not None:
            admitted = set(_leaves(cls.model_fields[info.field_name].annotation))
            if admitted & {int, float} and bool not in admitted:
                raise PydanticCustomError("int_type" if int in admitted else "float_type", "not a number")
        return value


def load(
    model_class: type[Model], path: Path | str, overrides: Sequence[str] = (), *, ignore: Collection[str] = ()
) -> Model:
    """The recipe in `path` with `overrides` (`parallel.tp=2`) applied; sections named in `ignore` are passed over."""
    source = _read(Path(path))
    for override in overrides:
        source.override(override)
    known = _keys(model_class)
    for name in ignore:
        if name not in known:
            source.data.pop(name, None)
    unknown = [key for key in source.data if key not in known]
    for key in unknown:
        source.fault((key,), _no_such_key(key, [*known, *ignore], [*_all_keys(model_class)]))
        del source.data[key]
    try:
        recipe = model_class.model_validate(source.data)
    except ValidationError as error:
        for key, what in _explain(error, source.data, model_class):
            source.fault(key, what)
    else:
        if not source.faults:
            return recipe
    raise InputError("\n".join(dict.fromkeys(source.faults)))


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML that `load` reads back to an equal value."""
    plain = recipe.model_dump(mode="json")
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


# --------------------------------------------------------------------------------------------------- reading YAML


@dataclass
class _Source:
    """What was read, where each key stands, and the faults found so far."""

    file: str
    data: dict[Any, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)  # "file:line" or "override a.b=c"
    faults: list[str] = field(default_factory=list)
    visited: set[int] = field(default_factory=set)  # mapping nodes whose keys were checked

    def fault(self, key: Key, what: str) -> None:
        name = _dotted(key)
        self.faults.append(f"{self.place(key)}: {name}: {what}" if name else f"{self.place(key)}: {what}")

    def place(self, key: Key) -> str:
        """Where the key stands; for one that is missing, where its section stands."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.file)

    def override(self, text: str) -> None:
        """Apply `a.b=value`; the value is read as YAML."""
        place = f"override {text}"
        name, equals, value_text = text.partition("=")
        parts = tuple(name.strip().split("."))
        if not equals or not all(parts):
            self.faults.append(f"{place}: not of the form key=value, such as parallel.tp=2")
            return
        aside = _Source(place)
        try:
            value = aside.read(value_text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "it cannot be read"
            self.faults.append(
                f"{place}: the value is no valid YAML ({problem}); put text with special signs in quotes"
            )
            return
        self.faults += aside.faults
        section = self.data
        for depth, part in enumerate(parts[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
                self._forget(parts[:depth])
                self.places[parts[:depth]] = place
            section = section[part]
            if not isinstance(section, dict):
                above = ".".join(parts[:depth])
                self.faults.append(
                    f"{place}: {above} holds {_show(section)}, which has no keys; set {above} as a whole"
                )
                return
        section[parts[-1]] = value
        self._forget(parts)
        self.places[parts] = place

    def _forget(self, key: Key) -> None:
        for old in [old for old in self.places if old[: len(key)] == key]:
            del self.places[old]

    def read(self, text: str) -> Any:
        """The value of a YAML text; notes the line of every key."""
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, (), ())
        finally:
            loader.dispose()

    def _value(self, loader: _Loader, node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> Any:
        if any(node is parent for parent in above):
            raise yaml.constructor.ConstructorError(None, None, "an alias holds itself", node.start_mark)
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            if id(node) not in self.visited:  # by an alias a node comes again, with its merges done
                self.visited.add(id(node))
                self._duplicates(node, key)
                loader.flatten_mapping(node)
            result: dict[Any, Any] = {}
            for name_node, value_node in node.value:
                if not isinstance(name_node, yaml.ScalarNode):
                    mark = name_node.start_mark
                    raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", mark)
                name = name_node.value
                self.places[(*key, name)] = f"{self.file}:{name_node.start_mark.line + 1}"
                result[name] = self._value(loader, value_node, (*key, name), above)
            return result
        if isinstance(node, yaml.SequenceNode):
            items = []
            for place, item in enumerate(node.value):
                self.places[(*key, place)] = f"{self.file}:{item.start_mark.line + 1}"
                items.append(self._value(loader, item, (*key, place), above))
            return items
        return loader.construct_object(node)

    def _duplicates(self, node: yaml.MappingNode, key: Key) -> None:
        first: dict[str, int] = {}
        for name_node, _ in node.value:
            name, line = name_node.value, name_node.start_mark.line + 1
            if isinstance(name, str) and name in first:
                where = f"{self.file}:{line}" if not self.file.startswith("override ") else self.file
                also = f" (first on line {first[name]})" if line != first[name] else ""
                self.faults.append(f"{where}: {_dotted((*key, name))}: given twice{also}; keep one")
            elif isinstance(name, str):
                first[name] = line


def _read(path: Path) -> _Source:
    source = _Source(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a recipe") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; give the path of a recipe (a YAML file)") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; give a recipe that can be read") from None
    try:
        data = source.read(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        parts = [part for part in (error.problem, error.context) if part]
        raise InputError(f"{where}: not valid YAML: {' '.join(parts)}; {_mend_yaml(error.problem or '')}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}; save it as plain text") from None
    if data is not None and not isinstance(data, dict):
        raise InputError(f"{path}:1: a recipe is a mapping of sections (`train: {{steps: 20}}`), not {_show(data)}")
    source.data = data or {}
    return source


def _mend_yaml(problem: str) -> str:
    if "'\\t'" in problem:
        return "indent with spaces"
    if "expected a single document" in problem or "another document" in problem:
        return "keep one document"
    return "check indentation, quotes and brackets here and one line above"


class _Loader(yaml.SafeLoader):
    """YAML with the number syntax of YAML 1.2; no dates, no base-60 numbers, no `yes` and `no`."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # pyrefly: ignore


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read back as text."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # pyrefly: ignore

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9](?:_?[0-9])*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9](?:_?[0-9])*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
]
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)


def _real(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, _quotes(text)))
_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", _number(value)))


def _quotes(text: str) -> str | None:
    """Double quotes where a sign would be taken for a line break; else the dumper's choice."""
    return '"' if not text.isprintable() else None


def _number(value: float) -> str:
    text = repr(value)
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)


# ------------------------------------------------------------------------------------------------ explaining faults


def _explain(error: ValidationError, data: Any, model_class: type[BaseModel]) -> Iterator[tuple[Key, str]]:
    """(key, what is wrong) for every fault; the branches of a union are told as one."""
    wanted: dict[Key, list[str]] = {}
    faulty: set[Key] = set()
    for fault in error.errors(include_url=False):
        key = _key(fault["loc"], data)
        faulty.add(key)
        kind = fault["type"]
        if kind == "extra_forbidden":
            yield key, _no_such_key(str(key[-1]), _siblings(model_class, key[:-1]), [*_all_keys(model_class)])
        elif kind == "missing":
            yield (*key, str(fault["loc"][-1])), "is missing; give it"
        elif kind in ("value_error", "assertion_error"):
            for line in str(fault["ctx"]["error"]).splitlines():
                yield _own_key(key, line, data)
        elif kind in _WANTED:
            wanted.setdefault(key, []).append(_wanted(fault))
        else:
            yield key, f"{fault['msg'][:1].lower()}{fault['msg'][1:]}, not {_show(fault['input'])}"
    for key, kinds in wanted.items():
        if any(other[: len(key)] == key and len(other) > len(key) for other in faulty):
            continue  # one branch of a union fits so far and its own faults are told
        value = _at(data, key)
        yield key, f"must be {' or '.join(dict.fromkeys(kinds))}, not {_show(value)}{_hint(value, kinds)}"


_WANTED: dict[str, str] = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "none_required": "null",
    "literal_error": "one of {expected}",
    "enum": "one of {expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
    "string_too_short": "at least {min_length} signs long",
    "string_too_long": "at most {max_length} signs long",
    "string_pattern_mismatch": "text like {pattern}",
}


def _wanted(fault: Any) -> str:
    context = {name: _plain(value) for name, value in fault.get("ctx", {}).items()}
    return _WANTED[fault["type"]].format(**context)


def _plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).replace("'", "").replace(" or ", ", ") if isinstance(value, str) else str(value)


def _hint(value: Any, kinds: Sequence[str]) -> str:
    """How to mend a value of the wrong kind, where that can be guessed."""
    if isinstance(value, str):
        choices = [choice for kind in kinds if kind.startswith("one of ") for choice in kind[7:].split(", ")]
        near = difflib.get_close_matches(value, choices, n=1)
        if near:
            return f"; did you mean {near[0]}?"
        return f"; write it in brackets: [{value}]" if "," in value and "a list" in kinds else ""
    if isinstance(value, (int, float)) and set(kinds) <= {"text", "a path"}:
        return "; put it in quotes"
    return ""


def _no_such_key(key: str, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """`elsewhere` holds the dotted keys of the whole recipe: a key may stand in the wrong section."""
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [name for name in known if sorted(name) == sorted(key.lower())]  # pt for tp
    near = near or [name for name in elsewhere if name.rpartition(".")[2] == key]
    if near:
        return f"no such key; did you mean {near[0]}?"
    return f"no such key; known here: {', '.join(sorted(known))}" if known else "no such key; this has no keys"


def _all_keys(model_class: type[BaseModel]) -> Iterator[str]:
    """The dotted keys of a recipe, sections within sections too."""
    for name, info in zip(_keys(model_class), model_class.model_fields.values(), strict=True):
        yield name
        for leaf in _leaves(info.annotation):
            if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                yield from (f"{name}.{inner}" for inner in _all_keys(leaf))


def _own_key(key: Key, line: str, data: Any) -> tuple[Key, str]:
    """A validator's line may begin with the key it is about, as `tp: ...` or `parallel.tp: ...`."""
    match = re.match(r"([A-Za-z_]\w*(?:\.\w+)*): (.+)", line)
    if match is None:
        return key, line
    return (*key, *match[1].split(".")), match[2]


def _key(location: Sequence[str | int], data: Any) -> Key:
    """The part of pydantic's location that is in the data: it also names the branches of unions."""
    key: list[str | int] = []
    for part in location:
        inside = part in data if isinstance(data, Mapping) else isinstance(data, list) and part in range(len(data))
        if inside:
            data = data[part]
            key.append(part)
    return tuple(key)


def _at(data: Any, key: Key) -> Any:
    for part in key:
        data = data[part]
    return data


def _keys(model_class: type[BaseModel]) -> list[str]:
    """The names by which the fields of a model are given."""
    return [info.alias or name for name, info in model_class.model_fields.items()]


def _siblings(model_class: type[BaseModel], key: Key) -> list[str]:
    """The keys that the section at `key` knows."""
    models: list[type[BaseModel]] = [model_class]
    for part in key:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        inside = [leaf for info in fields for leaf in _leaves(info.annotation)]
        found = [leaf for leaf in inside if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
        models = found or ([] if fields else models)
    return [name for model in models for name in _keys(model)]


def _leaves(annotation: Any) -> Iterator[Any]:
    """The plain types inside an annotation: int and None of `list[int] | None`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        yield from (type(value) for value in arguments)
    elif arguments:
        for argument in arguments:
            yield from _leaves(argument)
    else:
        yield annotation


_NUMBERS = re.compile(r"\s*[-+]?\d+\s*(?:,\s*[-+]?\d+\s*)*")


def _lists_integers(annotation: Any) -> bool:
    """True for `list[int] | None` and its like, which take no text and no single number themselves."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    lists = [member for member in members if typing.get_origin(member) in (list, tuple)]
    of_integers = any(int in _leaves(one) and not {str, float} & {*_leaves(one)} for one in lists)
    return of_integers and not any(member in (str, int) for member in members)


def _dotted(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _show(value: Any) -> str:
    """A value as the user wrote it, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
