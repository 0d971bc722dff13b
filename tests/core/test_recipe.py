"""Recipes: what YAML and overrides become, and how every error is told."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from mindspeed_core.errors import InputError
from mindspeed_core.recipe import Section, dump, load


class Parallel(Section):
    tp: int = Field(1, ge=1)
    sp: bool = False
    layers: list[int] | None = None
    places: tuple[int, ...] = ()
    ranks: Literal["all"] | list[Annotated[int, Field(ge=-1)]] = "all"

    @model_validator(mode="after")
    def check(self):
        if self.sp and self.tp == 1:
            raise ValueError("sp: needs tp of at least 2; set tp, or sp: false")
        return self


class Optim(Section):
    lr: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"


class Data(Section):
    train: str | dict[str, float]
    folder: Path | None = None
    name: str | None = None
    split: str | list[float] | list[int] | None = None


class Recipe(Section):
    data: Data
    parallel: Parallel = Parallel()
    optim: Optim = Optim()
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def check(self):
        if self.parallel.tp == 7:
            raise ValueError("parallel.tp: 7 divides nothing; use 2\noptim.lr: too large for this; use 1e-4")
        return self


@pytest.fixture
def recipe(tmp_path):
    """Load a text; `recipe(text, *overrides)`."""
    file = tmp_path / "r.yaml"

    def read(text, *overrides, ignore=("model", "train")):
        file.write_text(text)
        return load(Recipe, file, overrides, ignore=ignore)

    def errors(text, *overrides):
        with pytest.raises(InputError) as caught:
            read(text, *overrides)
        return [line.replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()]

    read.errors = errors
    return read


def test_sections_become_frozen_values(recipe):
    value = recipe("data: {train: a}\nparallel: {tp: 2, sp: true}\n")
    assert (value.data.train, value.parallel.tp, value.parallel.sp, value.optim.lr) == ("a", 2, True, 1e-3)
    with pytest.raises(ValueError, match="frozen"):
        value.parallel.tp = 3


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("1E+3", 1000.0), ("3", 3.0), (".5", 0.5), ("1_000", 1000.0), ("-2.5e3", -2500)],
)
def test_numbers_are_numbers_as_people_write_them(recipe, text, number):
    assert recipe(f"data: {{train: a}}\noptim: {{lr: {text}}}").optim.lr == number
    assert recipe("data: {train: a}", f"optim.lr={text}").optim.lr == number


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2024-01-01", "1e", "v1.2"])
def test_nothing_else_is_guessed_from_text(recipe, text):
    assert recipe(f"data: {{train: a, name: {text}}}").data.name == text


def test_overrides_are_yaml_and_win_over_the_file(recipe):
    value = recipe(
        "data: {train: a}\nparallel: {tp: 2}",
        "parallel.tp=4",
        "parallel.layers=[1, 2]",
        "data.train={x: 0.3, y.z: 0.7}",
        "precision=bf16",
    )
    assert (value.parallel.tp, value.parallel.layers, value.precision) == (4, [1, 2], "bf16")
    assert value.data.train == {"x": 0.3, "y.z": 0.7}
    assert recipe("data: {train: a, name: b}", "data.name=").data.name is None
    assert recipe("data: {train: a}\nparallel:\n", "parallel.tp=2").parallel.tp == 2


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("3,1", [3, 1]), ("3, 1", [3, 1]), ("'3,1'", [3, 1]), ("0", [0]), ("-1", [-1]), ("[2, 1]", [2, 1])],
)
def test_a_list_of_whole_numbers_may_be_written_with_commas(recipe, text, numbers):
    assert recipe("data: {train: a}", f"parallel.layers={text}").parallel.layers == numbers
    assert recipe(f"data: {{train: a}}\nparallel:\n  layers: {text}").parallel.layers == numbers
    assert recipe(f"data: {{train: a}}\nparallel:\n  places: {text}").parallel.places == tuple(numbers)
    assert recipe(f"data: {{train: a}}\nparallel:\n  ranks: {text}").parallel.ranks == numbers


def test_what_may_be_text_stays_text(recipe):
    assert recipe("data: {train: a, split: '9,1'}").data.split == "9,1"
    assert recipe("data: {train: a}\nparallel: {ranks: all}").parallel.ranks == "all"


def test_sections_of_other_commands_are_passed_over_by_name(recipe):
    assert recipe("data: {train: a}\nmodel: {anything: [1]}\ntrain: 3").data.train == "a"


def test_every_error_is_told_at_once_each_with_its_line_and_a_way_to_mend_it(recipe):
    errors = recipe.errors(
        "data: {trian: a}\n"
        "paralel: {}\n"
        "parallel:\n"
        "  tp: two\n"
        "  sp: maybe\n"
        "optim:\n"
        "  lr: fast\n"
        "  schedule: cosin\n"
        "precision: bf61\n"
    )
    assert sorted(errors) == [
        "r.yaml:1: data.train: is missing; give it",
        "r.yaml:1: data.trian: no such key; did you mean train?",
        "r.yaml:2: paralel: no such key; did you mean parallel?",
        'r.yaml:4: parallel.tp: must be a whole number, not "two"',
        'r.yaml:5: parallel.sp: must be true or false, not "maybe"',
        'r.yaml:7: optim.lr: must be a number, not "fast"',
        'r.yaml:8: optim.schedule: must be one of cosine, linear, constant, not "cosin"; did you mean cosine?',
        'r.yaml:9: precision: must be one of fp32, bf16, not "bf61"; did you mean bf16?',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {train: a}\nparallel: {tp: 0}", "r.yaml:2: parallel.tp: must be at least 1, not 0"),
        ("data: {train: a}\nparallel: {tp: true}", "r.yaml:2: parallel.tp: must be a whole number, not true"),
        ("data: {train: a}\nparallel: {tp: 1.5}", "r.yaml:2: parallel.tp: must be a whole number, not 1.5"),
        ("data: {train: a}\noptim: {lr: false}", "r.yaml:2: optim.lr: must be a number, not false"),
        ("data: {train: a}\nparallel: 3", "r.yaml:2: parallel: must be a section of keys, not 3"),
        ("data: {train: a}\nparallel: null", "r.yaml:2: parallel: must be a section of keys, not null"),
        ("data: {train: 3}", "r.yaml:1: data.train: must be text or a mapping of keys to values, not 3"),
        ("data: {train: {p: x}}", 'r.yaml:1: data.train.p: must be a number, not "x"'),
        ("data: {train: a, name: 5}", "r.yaml:1: data.name: must be text, not 5; put it in quotes"),
        (
            "data: {train: a}\nparallel:\n  layers:\n  - 1\n  - b",
            'r.yaml:5: parallel.layers[1]: must be a whole number, not "b"',
        ),
        (
            "data: {train: a}\nparallel: {layers: '3,x'}",
            'r.yaml:2: parallel.layers: must be a list, not "3,x"; write it in brackets: [3,x]',
        ),
        ("data: {train: a}\nparallel: {layers: true}", "r.yaml:2: parallel.layers: must be a whole number, not true"),
        (
            "data: {train: a}\nparallel: {sp: true}",
            "r.yaml:2: parallel.sp: needs tp of at least 2; set tp, or sp: false",
        ),
        (
            "data: {train: a}\nzzz: 1",
            "r.yaml:2: zzz: no such key; known here: data, model, optim, parallel, precision, train",
        ),
        ("data: {train: a}\nparallel: {lr: 1}", "r.yaml:2: parallel.lr: no such key; did you mean optim.lr?"),
        ("data: {train: a}\ntp: 2", "r.yaml:2: tp: no such key; did you mean parallel.tp?"),
        ("precision: fp32", "r.yaml: data: is missing; give it"),
        ("", "r.yaml: data: is missing; give it"),
        ("- a", 'r.yaml:1: a recipe is a mapping of sections (`train: {steps: 20}`), not ["a"]'),
    ],
)
def test_an_error_says_where_what_and_how_to_mend_it(recipe, text, expected):
    assert recipe.errors(text) == [expected]


def test_a_check_across_sections_tells_each_key_with_its_line(recipe):
    assert recipe.errors("data: {train: a}\nparallel:\n  tp: 7\noptim:\n  lr: 1") == [
        "r.yaml:3: parallel.tp: 7 divides nothing; use 2",
        "r.yaml:5: optim.lr: too large for this; use 1e-4",
    ]


def test_a_key_given_twice_is_an_error(recipe):
    assert recipe.errors("data: {train: a}\nparallel:\n  tp: 1\n  tp: 2\n") == [
        "r.yaml:4: parallel.tp: given twice (first on line 3); keep one"
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.tp=x", 'override parallel.tp=x: parallel.tp: must be a whole number, not "x"'),
        ("parallel.pt=2", "override parallel.pt=2: parallel.pt: no such key; did you mean tp?"),
        ("paralel.tp=2", "override paralel.tp=2: paralel: no such key; did you mean parallel?"),
        ("parallel.tp", "override parallel.tp: not of the form key=value, such as parallel.tp=2"),
        ("=3", "override =3: not of the form key=value, such as parallel.tp=2"),
        (
            "precision.x=3",
            'override precision.x=3: precision holds "fp32", which has no keys; set precision as a whole',
        ),
    ],
)
def test_an_error_of_an_override_names_the_override(recipe, override, expected):
    assert recipe.errors("data: {train: a}\nprecision: fp32\nparallel: {tp: 2}", override) == [expected]


def test_an_override_that_is_no_yaml_is_told(recipe):
    (error,) = recipe.errors("data: {train: a}", "parallel.layers=[1,")
    assert error.startswith("override parallel.layers=[1,: the value is no valid YAML (")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {train: a\nparallel: {tp: 1}\n", "r.yaml:2: not valid YAML: "),
        ("data:\n\ttrain: a\n", "r.yaml:2: not valid YAML: "),
        ("data: {train: a}\n---\ndata: {train: b}\n", "r.yaml:2: not valid YAML: "),
        ("data: &a\n  train: *a\n", "r.yaml:1: not valid YAML: an alias holds itself"),
        ("data: {train: !!python/name:os.system a}", "r.yaml:1: not valid YAML: could not determine a constructor"),
        ("data: {train: a}\n? [x]\n: 1\n", "r.yaml:2: not valid YAML: a key must be plain text"),
    ],
)
def test_broken_yaml_is_one_line_with_its_place(recipe, text, expected):
    (error,) = recipe.errors(text)
    assert error.startswith(expected)


def test_anchors_and_merges_work(recipe):
    text = "model: &m {tp: 2, sp: false}\ndata: {train: a}\nparallel: {<<: *m, sp: true}\ntrain: *m\n"
    value = recipe(text)
    assert (value.parallel.tp, value.parallel.sp) == (2, True)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    control = tmp_path / "c.yaml"
    control.write_bytes(b"a: \x00")
    for path, what in [
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "this is a folder"),
        (binary, "not a text file"),
        (control, "not valid YAML"),
    ]:
        with pytest.raises(InputError, match=what) as caught:
            load(Recipe, path)
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value).splitlines()) == 1


text = st.text(max_size=20)
recipes = st.builds(
    Recipe,
    data=st.builds(Data, train=text | st.dictionaries(text, st.floats(allow_nan=False)), name=text | st.none()),
    parallel=st.builds(
        Parallel, tp=st.integers(2, 6), sp=st.booleans(), layers=st.lists(st.integers(), max_size=4) | st.none()
    ),
    optim=st.builds(Optim, lr=st.floats(allow_nan=False)),
)


@settings(max_examples=50, deadline=None)
@given(value=recipes)
def test_what_dump_writes_load_reads_back_equal(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(value), encoding="utf-8")
    assert load(Recipe, file) == value


@pytest.mark.parametrize(
    "word", ["1e-4", "null", "~", "true", "0x10", "1_000", ".inf", "", "no", "a: b", "- a", "ü\n", "\x85", "<<"]
)
def test_text_that_looks_like_something_else_survives_a_dump(tmp_path, word):
    value = Recipe(data=Data(train={word: 1.0}, name=word))
    (tmp_path / "r.yaml").write_text(dump(value), encoding="utf-8")
    assert load(Recipe, tmp_path / "r.yaml") == value
