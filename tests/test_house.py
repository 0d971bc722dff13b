"""What a reader of the repository relies on: arrows, versions, documents that tell the truth. Reads; runs little."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # in Python 3.11

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "data", "convert", "train", "eval", "serve")
CORE = ROOT / "packages/mindspeed-core/src/mindspeed_core"

# Which package may import which; each also declares it.
ARROWS = {
    "core": set(),
    "data": {"core"},
    "convert": {"core"},
    "train": {"core", "data"},
    "eval": {"core"},
    "serve": {"core"},
}

# The floors of core: a file imports from its own floor and from those above it in this list, never from below.
FLOORS = [
    ("errors",),
    (
        "recipe",
        "standing",
        "verdict",
        "launch",
        "launcher",
        "sentencepiece_model",
        "tokenizer_file",
        "optim.adamw",
        "optim.bf16",
        "optim.reuse_fp32",
        "optim.scaling",
        "optim.schedule",
        "parallel.pipeline",
    ),
    ("parallel.exchange", "parallel.gloo"),
    ("device", "precision", "profiling", "cli", "tokenizer", "conversation", "chat_template", "templates"),
    ("megatron", "kernels"),
    ("parallel.mesh", "parallel.linear"),
    ("optim", "parallel"),
    ("memory",),
    ("models",),
    ("checkpoint",),
    ("generate",),
    ("doctor", "__main__"),
]

HEAVY = {"torch", "transformers", "megatron", "datasets", "lm_eval", "gradio", "numpy", "pyarrow", "yaml", "rich"}


def sources(*packages: str) -> list[Path]:
    """The source files of the packages, of all of them if none is named."""
    names = packages or PACKAGES
    return [file for name in names for file in sorted((ROOT / f"packages/mindspeed-{name}/src").rglob("*.py"))]


def parsed(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file)))


def imports(file: Path) -> set[str]:
    """The dotted names that a file imports anywhere, those it names to `import_module` too."""
    found: set[str] = set()
    for node in parsed(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(file, node)}: a relative import; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {str(name.value) for name in node.args if isinstance(name, ast.Constant)}
    return found


def where(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def project(name: str) -> dict:
    return tomllib.loads((ROOT / f"packages/mindspeed-{name}/pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_imports_only_those_it_may_and_declares_them(name):
    used = {module.partition(".")[0] for file in sources(name) for module in imports(file)}
    siblings = {module.removeprefix("mindspeed_") for module in used if module.startswith("mindspeed_")} - {name}
    declared = {found[1] for text in project(name)["dependencies"] if (found := re.match(r"mindspeed-(\w+)", text))}
    assert siblings <= ARROWS[name]
    assert declared == ARROWS[name]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_tested_alone_beside_the_siblings_it_declares(name):
    alone = tomllib.loads((ROOT / "hatch.toml").read_text(encoding="utf-8"))["envs"]["alone"]
    added = alone["overrides"]["matrix"]["package"]["workspace"]["members"]
    beside = {member["value"] for member in added if name in member["if"]}
    assert beside == {f"packages/mindspeed-{sibling}" for sibling in ARROWS[name]}


def test_inside_core_no_file_imports_from_a_floor_below_it():
    floors = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

    def floor(module: str) -> int | None:
        """The number of the floor; None for the package itself."""
        parts = module.split(".")[1:]
        names = [".".join(parts[:length]) for length in (2, 1)]
        return next((floors[name] for name in names if name in floors), None)

    wrong = []
    for file in sources("core"):
        module = ".".join(file.relative_to(CORE.parent).with_suffix("").parts).removesuffix(".__init__")
        own = floor(module)
        assert own is not None or module == "mindspeed_core", f"{file.relative_to(ROOT)} is on no floor of FLOORS"
        for name in imports(file) - typing_only(file):
            other = floor(name) if name.startswith("mindspeed_core.") else None
            if own is not None and other is not None and other > own:
                wrong.append(f"{file.relative_to(CORE)} imports {name}")
    assert not wrong, wrong


def typing_only(file: Path) -> set[str]:
    """What is imported for type checkers alone."""
    blocks = [node for node in parsed(file) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    nodes = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {str(n.module) for n in nodes}


def test_torch_npu_is_imported_in_one_place():
    users = {
        file.relative_to(CORE).as_posix()
        for file in sources()
        if "torch_npu" in {n.split(".")[0] for n in imports(file)}
    }
    assert users == {"device.py"}


def test_nothing_is_global():
    assert not [where(file, node) for file in sources() for node in parsed(file) if isinstance(node, ast.Global)]


def test_nobody_assigns_into_a_foreign_module_but_the_table_of_mends():
    wrong = []
    for file in sources():
        if file == CORE / "megatron.py":
            continue
        foreign = set()
        for node in parsed(file):
            if isinstance(node, ast.Import):
                foreign |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("mindspeed_"):
                foreign |= {alias.asname or alias.name for alias in node.names}
        for node in parsed(file):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            targets = targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                targets = [ast.Attribute(node.args[0], "", ast.Store())]
            for target in targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in foreign:
                    wrong.append(where(file, node))
    assert not wrong, wrong


def test_six_versions_their_pins_and_the_changelog_agree():
    versions = {name: project(name)["version"] for name in PACKAGES}
    (version,) = set(versions.values())
    minor = ".".join(version.split(".")[:2])
    for name in PACKAGES:
        pins = [text for text in project(name)["dependencies"] if text.startswith("mindspeed-")]
        assert all(text.endswith(f"=={minor}.*") for text in pins), (name, pins)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


@pytest.fixture(scope="module")
def commands():
    """{command: {subcommand: its options}} as the programs themselves know them."""
    import typer

    found = {}
    for name in PACKAGES:
        module = __import__(f"mindspeed_{name}.__main__", fromlist=["app"])
        group = typer.main.get_command(module.app)
        found[f"mindspeed-{name}"] = {
            sub: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            for sub, command in group.commands.items()
        }
    return found


def documents() -> list[Path]:
    return [
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted(ROOT.glob("packages/*/README.md")),
    ]


def command_lines(document: Path) -> Iterator[list[str]]:
    """The command lines of ours that a document shows: lines of code blocks, and code within text."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown += re.findall(r"`(mindspeed-[^`\n]+)`", text)
    for line in shown:
        line = re.sub(r"^\s*\$\s+", "", line)
        if line.lstrip().startswith(tuple(f"mindspeed-{name} " for name in PACKAGES)):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_and_option_in_a_document_exists(document, commands):
    for command, *words in command_lines(document):
        subcommands = words[0].split("|") if words and not words[0].startswith("-") else []
        for subcommand in subcommands:
            assert subcommand in commands[command], f"{command} {subcommand}"
            options = {word.partition("=")[0].strip("[]") for word in words if word.startswith(("--", "[--"))}
            assert options - {"--help"} <= commands[command][subcommand], f"{command} {' '.join(words)}"


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_in_a_document_leads_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert not missing


def test_the_readme_names_every_command(commands):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [command for command in commands if command not in readme] == []


def test_every_environment_command_in_a_document_exists():
    hatch = tomllib.loads((ROOT / "hatch.toml").read_text(encoding="utf-8"))["envs"]
    for document in documents():
        for environment, script in re.findall(r"hatch run (?:(\w+):)?(\w+)", document.read_text(encoding="utf-8")):
            assert script in hatch[environment or "default"]["scripts"], f"{document.name}: {environment}:{script}"


def rows(document: Path) -> Iterator[tuple[str, list[str]]]:
    """The head of each row of a document's tables, the text above its first column and the names in that column."""
    head = ""
    for line in document.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = ""
        elif not head:
            head = line.split("|")[1].strip(" `")
        else:
            yield head, re.findall(r"`([\w.]+)`", line.split("|")[1])


def documented_keys() -> set[str]:
    """The keys of a recipe that docs/recipes.md names, and those in the tables of a section (`memory.`) that it points to.

    A name without its section is of that of the name before it.
    """
    page = ROOT / "docs/recipes.md"
    text = page.read_text(encoding="utf-8")
    found = {
        name for names in re.findall(r"not built yet \((.*?)\)", text) for name in re.findall(r"`([\w.]+)`", names)
    }
    for document in [page, *sorted({page.parent / link for link in re.findall(r"\]\((\w+\.md)", text)})]:
        for head, names in rows(document):
            section = head if head.endswith(".") else ""
            for name in names if section or (document == page and head == "key") else ():
                if "." in name or (not section and name == names[0]):
                    section, _, name = name.rpartition(".")
                    section += "." if section else ""
                found.add(section + name)
    return found


def test_the_documents_name_every_key_of_a_recipe_and_no_other():
    import typing

    from mindspeed_core.recipe import Section
    from mindspeed_train.config import Recipe

    def keys(section):
        for name, field in section.model_fields.items():
            inner = [kind for kind in (field.annotation, *typing.get_args(field.annotation)) if isinstance(kind, type)]
            sections = [kind for kind in inner if issubclass(kind, Section)]
            shown = field.alias or name
            yield from (f"{shown}.{key}" for kind in sections for key in keys(kind))
            if not sections:
                yield shown

    known, documented = set(keys(Recipe)), documented_keys()
    assert len(known) > 90
    assert known - documented == set()
    assert documented - known == set()


EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_example_loads_and_its_ranks_form_its_mesh(example):
    from mindspeed_core.models.build import check
    from mindspeed_core.models.families import family_of
    from mindspeed_core.recipe import dump, load
    from mindspeed_train.config import Recipe

    recipe = load(Recipe, example, ignore=("align",))
    recipe.parallel.check(recipe.parallel.world_size())
    if recipe.model.preset is not None:
        config = recipe.model.config()
        assert recipe.model.problems() == []
        assert check(family_of(config).architecture(config), recipe.parallel) == []
    assert dump(recipe)


@pytest.mark.parametrize("name", PACKAGES)
def test_help_is_quick_because_nothing_heavy_is_loaded_for_it(name):
    """The help of the command and of each subcommand; what they load is what takes time, and no clock is needed."""
    program = (
        "import io, sys, contextlib\n"
        f"import mindspeed_{name}.__main__ as module\n"
        "import typer\n"
        "def help(*args):\n"
        f"    sys.argv = ['mindspeed-{name}', *args, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try:\n"
        "            module.main()\n"
        "        except SystemExit as end:\n"
        "            assert end.code == 0, end.code\n"
        "    assert 'Usage: ' in out.getvalue() and '╭' not in out.getvalue()\n"
        "help()\n"
        "for subcommand in typer.main.get_command(module.app).commands:\n"
        "    help(subcommand)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_has_its_licence_readme_types_and_command(name):
    folder = ROOT / f"packages/mindspeed-{name}"
    assert project(name)["license"] == "Apache-2.0"
    assert project(name)["scripts"] == {f"mindspeed-{name}": f"mindspeed_{name}.__main__:main"}
    assert (folder / f"src/mindspeed_{name}/py.typed").exists()
    assert (folder / "README.md").exists()
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
