"""Stand-ins for the CANN libraries that the installed torch_npu wheel links to.

Everything is read from the wheel: which libraries nobody provides (`readelf`), which symbols nobody defines (`nm`), and
which names it looks up while it runs (its strings). `runtime.c` and `collectives.c` are compiled against the headers in
the wheel; every other function answers 0, or an error where success would be a lie. `libopapi.so` holds CANN's operators:
they only write down that they were launched.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
VERSION = "8.5.0"  # what it says it is
OPERATORS = "libopapi.so"
SYSTEM = tuple(map(Path, ("/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64")))
MADE = ("Tensor", "Scalar", "IntArray", "FloatArray", "BoolArray", "TensorList", "ScalarList", "Fp16Array", "Bf16Array")
RUNTIME = rb"(?:acl(?:rt|op|mdl|prof|sys|dump)?|Hccl|Hcom|Msprof)[A-Z][A-Za-z0-9]+"
TRANSFER = re.compile("Hccl(All|Reduce|Broadcast|Scatter|Send|Recv|Batch)")
FLAGS = ("-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-error=unused-parameter", "-Wno-unused-parameter")


def build(cache: Path) -> Path:
    """Return the folder of the libraries, which looks like CANN's; made on first use, several processes may ask at once."""
    wheel = _package("torch_npu")
    sources = [Path(__file__), *sorted(HERE.glob("*.c")), wheel / "version.py"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    final = cache / key
    if not final.exists():
        aside = cache / f"{key}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _make(aside, wheel)
        for part in ("opp", "runtime", "compiler"):  # what torch_npu looks for in ASCEND_HOME_PATH
            (aside / part).mkdir()
        (aside / "version.cfg").write_text(f"running_version=[{VERSION}]\n")
        try:
            aside.rename(final)
        except OSError:  # another process was first
            shutil.rmtree(aside)
    return final


def load(folder: Path, *, operators: bool = False) -> None:
    """Make torch_npu importable in this process; with `operators` its kernels launch operators that do nothing."""
    assert "torch_npu" not in sys.modules, "torch_npu has looked for CANN already"
    names = sorted(path.name for path in folder.glob("lib*.so") if path.name not in ("libcann_stub.so", OPERATORS))
    for name in ("libcann_stub.so", *names, *([OPERATORS] if operators else [])):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


class Launches:
    """The operators of `libopapi.so` that were launched since the last look."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(folder / OPERATORS))
        self._library.launched.restype = ctypes.c_char_p

    def take(self) -> list[str]:
        """Return their names in order, without `aclnn`, and forget them."""
        return self._library.launched().decode().replace("aclnn", "").split()


def _make(folder: Path, wheel: Path) -> None:
    torch_libraries = _package("torch") / "lib"
    own = [*wheel.glob("_C*.so"), *(wheel / "lib").glob("*.so")]
    present = {path.name for place in (wheel / "lib", torch_libraries) for path in place.glob("*.so*")}
    missing, system = set(), set()
    for name in {found for path in own for found in re.findall(r"NEEDED.*\[(.+?)\]", _run("readelf", "-dW", path))}:
        if name not in present:
            path = next((place / name for place in SYSTEM if (place / name).exists()), None)
            system.add(path) if path else missing.add(name)
    defined = set().union(*(_symbols(path, "defined") for path in [*own, *torch_libraries.glob("*.so*"), *system]))
    wanted = set().union(*(_symbols(path, "undefined") for path in own)) - defined
    strings = (wheel / "lib/libtorch_npu.so").read_bytes()
    wanted = {name for name in wanted if not re.match("_?Py", name)} | _names(strings, RUNTIME)
    operators = {re.sub("GetWorkspaceSize$", "", name) for name in _names(strings, rb"aclnn[A-Z][A-Za-z0-9]+")}

    # its constants are C++ array bounds: as macros they are C, too
    header = (wheel / "include/third_party/hccl/inc/hccl/hccl_types.h").read_text()
    constants = re.sub(r"^const u?int\d+_t (\w+)\s*=\s*([^;]+);", r"#define \1 \2", header, flags=re.MULTILINE)
    (folder / "hccl_types_c.h").write_text(constants)
    objects = []
    for source in sorted(HERE.glob("*.c")):
        objects.append(folder / f"{source.stem}.o")
        _run("gcc", "-c", *FLAGS, "-I", wheel / "include", "-I", folder, "-o", objects[-1], source)
    written = {line.split()[-1] for path in objects for line in _run("nm", "--defined-only", path).splitlines()}
    rest = sorted(name for name in wanted - written if not name.startswith("aclnn"))
    (folder / "rest.c").write_text(_rest(rest))
    _library(folder, "libcann_stub.so", *objects, folder / "rest.c")
    for name in missing:  # all are one library under many names: they share its state
        _library(folder, name, "-nostdlib", "-Wl,--no-as-needed,-rpath,$ORIGIN", f"-L{folder}", "-lcann_stub")
    (folder / "opapi.c").write_text(_operators(sorted(operators)))
    _library(folder, OPERATORS, folder / "opapi.c")


def _rest(names: list[str]) -> str:
    """C for the functions nobody wrote: 0, but a transfer that moves nothing is an error."""
    lines = [
        "#include <stdio.h>",
        'static long absent(const char *name) { fprintf(stderr, "CANN stub: no %s\\n", name); return 5; }',
    ]
    for name in names:
        answer = f'absent("{name}")' if TRANSFER.match(name) else "0"
        lines.append(f"long {name}(void) {{ return {answer}; }}")
    return "\n".join(lines) + "\n"


def _operators(names: list[str]) -> str:
    lines = [
        "#include <stdlib.h>",
        "#include <string.h>",
        "static char names[1 << 20], taken[1 << 20];",
        "static size_t length;",
        "static int launch(const char *name)",
        "{",
        "    size_t more = strlen(name);",
        "    if (length + more + 2 > sizeof names) return 1;",
        "    memcpy(names + length, name, more);",
        "    length += more;",
        "    names[length++] = ' ';",
        "    return 0;",
        "}",
        "const char *launched(void)",
        "{",
        "    memcpy(taken, names, length);",
        "    taken[length] = 0;",
        "    length = 0;",
        "    return taken;",
        "}",
    ]
    for kind in MADE:
        lines.append(f"void *aclCreate{kind}(void) {{ return malloc(8); }}")
        lines.append(f"int aclDestroy{kind}(void *made) {{ free(made); return 0; }}")
    for name in names:
        lines.append(f'int {name}(void) {{ return launch("{name}"); }}')
        lines.append(f"int {name}GetWorkspaceSize(void) {{ return 0; }}")
    return "\n".join(lines) + "\n"


def _library(folder: Path, name: str, *what: object) -> None:
    _run("gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", folder / name, *what)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # does not import it
    assert spec is not None, f"{name} is not installed"
    assert spec.submodule_search_locations, name
    return Path(spec.submodule_search_locations[0])


def _symbols(path: Path, kind: str) -> set[str]:
    rows = (line.split() for line in _run("nm", "-D", f"--{kind}-only", path).splitlines())
    return {row[-1].partition("@")[0] for row in rows if row[-2] != "w"}


def _names(strings: bytes, pattern: bytes) -> set[str]:
    return {found.decode() for found in re.findall(rb"(?<![A-Za-z0-9_])(" + pattern + rb")(?=\x00)", strings)}


def _run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return done.stdout
