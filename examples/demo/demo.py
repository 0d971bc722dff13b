"""The whole chain on any machine: real text, a tokenizer, pretraining on two ranks, a stop, a resume, export, a sample.

    hatch run demo [--out runs/demo] [--steps 2000]

The text is the source of Python's own library. Every step is a command you can type yourself; it is printed first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPTS = ("def __init__(self, name", 'class Reader:\n    """', "def find(path")
SKIP = {  # installed packages, tests, tables, and windows of buttons: what is left reads alike
    *("site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"),
    *("idlelib", "tkinter", "turtledemo", "lib2to3", "distutils"),
}
BLOCKS = "▁▂▃▄▅▆▇█"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes (replaced)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--megabytes", type=float, default=6.0, help="of source text to train on")
    args = parser.parse_args()
    start, out = time.monotonic(), args.out
    if (out / "run").exists() or (out / "text").exists():  # only what this demo has written
        for name in ("text", "tokenizer", "data", "run", "hf"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)

    title("1. Text: Python's own library")
    count, size = gather(out / "text", int(args.megabytes * 1e6))
    say(f"{count} files, {size / 1e6:.1f} MB -> {out}/text")

    title("2. A tokenizer, trained on it")
    tokenizer = train_tokenizer(out / "text" / "train.jsonl", out / "tokenizer")
    say(f"{tokenizer} byte-level BPE tokens -> {out}/tokenizer")

    title("3. Preprocess into Megatron's .bin and .idx")
    for part in ("train", "valid"):
        run("mindspeed-data", "pretrain", out / "text" / f"{part}.jsonl", "--tokenizer", out / "tokenizer",
            "--output", out / "data" / part, "--append-eod")  # fmt: skip

    title("4. Pretrain a small Llama on two ranks (tp=2)")
    half = args.steps // 2
    train = (
        "mindspeed-train", "pretrain", HERE / "pretrain.yaml", f"data.tokenizer={out}/tokenizer",
        f"data.train={out}/data/train", f"data.valid={out}/data/valid", f"checkpoint.folder={out}/run",
        f"train.steps={args.steps}", f"checkpoint.every={half}",
    )  # fmt: skip
    say(f"(stopped with Ctrl-C once the checkpoint of step {half} is written)")
    run_until(out / "run" / "checkpoints" / f"step_{half}", *train)

    title("5. The same command again: it goes on where it was stopped")
    run(*train)
    losses = curve(out / "run" / "metrics.jsonl")

    title("6. Export to Hugging Face")
    run("mindspeed-convert", "hf", out / "run", out / "hf")

    title("7. What it has learned")
    for seed, prompt in enumerate(PROMPTS):
        text = run("mindspeed-serve", "generate", out / "hf", "--prompt", prompt, "--max-new-tokens", "100",
                   "--temperature", "0.5", "--top-p", "0.9", "--seed", str(seed), capture=True)  # fmt: skip
        print("\n".join("    | " + line for line in (prompt + text).rstrip().splitlines()), flush=True)

    title(f"Done in {time.monotonic() - start:.0f} s")
    print(losses)
    print(f"""
  text          {out}/text
  tokenizer     {out}/tokenizer
  data          {out}/data
  training run  {out}/run        (recipe.yaml, metrics.jsonl, checkpoints/, tensorboard/)
  model         {out}/hf         (opens with transformers, too)

Go on with it:
  mindspeed-serve generate {out}/hf --prompt 'class ' --temperature 0.5
  mindspeed-serve web {out}/hf --template empty
""")


def gather(folder: Path, size: int) -> tuple[int, int]:
    """Write {"text"} rows of the library's modules, every twentieth into valid.jsonl; return files and bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if not SKIP & set(path.relative_to(library).parts))
    random.Random(0).shuffle(files)
    folder.mkdir(parents=True)
    total = used = 0
    with open(folder / "train.jsonl", "w") as train, open(folder / "valid.jsonl", "w") as valid:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if not text.strip():
                continue
            (valid if used % 20 == 19 else train).write(json.dumps({"text": text}) + "\n")
            used, total = used + 1, total + len(text)
            if total >= size:
                break
    if used < 40:
        sys.exit(f"error: {library} holds only {used} source files; the demo needs Python's library in source form")
    return used, total


def train_tokenizer(rows: Path, folder: Path, size: int = 1024) -> int:
    """Train a byte-level BPE on the rows and save it as transformers reads it; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(rows) as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end).save_pretrained(
        folder
    )
    return tokenizer.get_vocab_size()


def command(parts: tuple[object, ...]) -> list[str]:
    """Print the command as one would type it and return it as this interpreter runs it."""
    words = [str(part) for part in parts]
    print("$ " + " ".join(shlex.quote(word) for word in words), flush=True)
    return [sys.executable, "-m", words[0].replace("-", "_"), *words[1:]]


def run(*parts: object, capture: bool = False) -> str:
    """Run one of our commands to its end."""
    done = subprocess.run(command(parts), stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {parts[0]} ended with exit code {done.returncode}")
    return done.stdout or ""


def run_until(checkpoint: Path, *parts: object) -> None:
    """Run a training until it has written `checkpoint`, then press Ctrl-C."""
    process = subprocess.Popen(command(parts))
    latest = checkpoint.parent / "latest"
    while process.poll() is None:
        if latest.exists() and latest.read_text().strip() == checkpoint.name:
            os.kill(process.pid, signal.SIGINT)
            break
        time.sleep(0.2)
    code = process.wait()
    if code not in (0, 130):
        sys.exit(f"error: {parts[0]} ended with exit code {code}")


def curve(metrics: Path) -> str:
    """Return the loss over the steps as one line of blocks."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    valid = [row["valid_loss"] for row in rows if "valid_loss" in row]
    width = min(60, len(losses))
    means = [
        sum(part) / len(part)
        for part in (losses[i * len(losses) // width : (i + 1) * len(losses) // width] for i in range(width))
    ]
    low, high = min(means), max(means)
    drawn = "".join(BLOCKS[round((value - low) / (high - low or 1) * (len(BLOCKS) - 1))] for value in means)
    held_out = f", {valid[-1]:.2f} on modules it has not seen" if valid else ""
    return f"  loss {losses[0]:.2f} {drawn} {means[-1]:.2f} after {rows[-1]['step']} steps{held_out}"


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
