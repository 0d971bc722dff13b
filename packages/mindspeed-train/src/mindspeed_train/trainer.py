"""The trainer: builds everything a run owns from a recipe, and runs its steps."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from mindspeed_core import profiling
from mindspeed_core import recipe as recipes
from mindspeed_core.checkpoint import native
from mindspeed_core.checkpoint.native import Progress, State
from mindspeed_core.device import Device
from mindspeed_core.errors import InputError, writing
from mindspeed_core.kernels import select
from mindspeed_core.models.build import build_model
from mindspeed_core.models.weights import load_weights, mark, random_tensors
from mindspeed_core.optim.build import build_optimizer, set_lr
from mindspeed_core.parallel.data import gather_parameters, wrap_data_parallel
from mindspeed_core.parallel.mesh import Mesh
from mindspeed_data.batches import batches
from mindspeed_data.pretrain import BlendedSamples
from mindspeed_train.config import Recipe
from mindspeed_train.meter import Meter
from mindspeed_train.model import find_model, write_assets
from mindspeed_train.step import Loss, run_batch
from mindspeed_train.tasks import Task

ASSETS = ".hf"  # of the run folder: what every checkpoint carries in `hf/`
SHOWN = ("mindspeed-core", "mindspeed-data", "mindspeed-train", "torch", "torch-npu", "megatron-core", "transformers")


class Trainer:
    """Everything a run owns. Built once from a recipe; nothing of it is global."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.recipe, self.task = recipe, task
        self.folder = recipe.checkpoint.folder
        self.checkpoints = self.folder / "checkpoints"
        self.device = Device.open(recipe.device, deterministic=recipe.train.deterministic)
        self.mesh = Mesh.create(recipe.parallel, self.device, seed=recipe.train.seed, timeout=recipe.train.timeout)
        self.model = find_model(recipe)
        self._lock: int | None = None
        if self.mesh.is_main:
            self._lock = _lock(self.folder)
            native.clear(self.checkpoints)
        torch.distributed.barrier()
        resumed = self._resumed()
        if self.mesh.is_main:
            with writing(self.folder):
                self._write_down()
        chunks = self._build(random=resumed is None)
        self.chunks = wrap_data_parallel(chunks, recipe.optim, self.mesh)
        self.optimizer = build_optimizer(recipe.optim, self.chunks, self.mesh, recipe.precision)
        self.schedule = recipe.optim.schedule_over(recipe.train.steps)
        self.state = State(
            chunks=self.chunks, optimizer=self.optimizer, mesh=self.mesh, vocab_size=self.model.arch.vocab_size
        )
        self.progress = Progress() if resumed is None else native.load(resumed, self.state)
        self.train_data, self.valid_data = task.datasets(recipe, self.model)
        self.collate = task.collate(recipe, self.model)

    def train(self) -> Loss | None:
        """Run the steps that are left; return the loss of the last one."""
        recipe, steps = self.recipe, self.recipe.train.steps
        loss = None
        with self._meter() as meter, self._profiled() as made:
            if self.progress.step and meter:
                meter.say(f"continuing after step {self.progress.step} of {steps} in {self.folder}")
            if recipe.train.eval_every and not self.progress.step:
                self._evaluate(meter)  # what the run starts from
            data = self._batches()
            while self.progress.step < steps:
                with made(self.progress.step + 1):
                    loss = self._step(data, meter)
                if _due(self.progress.step, recipe.train.eval_every, steps):
                    self._evaluate(meter)
                if _due(self.progress.step, recipe.checkpoint.every, steps) or self.progress.step == steps:
                    self.save()
            if meter:
                meter.say(f"done: step {steps} of {steps} is in {self.checkpoints / f'step_{self.progress.step}'}")
        return loss

    def evaluate(self) -> float:
        """Return the loss on the validation data, as a mean over its tokens."""
        assert self.valid_data is not None
        train = self.recipe.train
        limit = train.eval_steps or math.ceil(len(self.valid_data) / self.recipe.batch.total)
        total = Loss(0.0, 0, 0)
        data = batches(
            self.valid_data,
            micro=self.recipe.batch.micro,
            global_batch=self.recipe.batch.total,
            dp_rank=self.mesh.dp.rank,
            dp_size=self.mesh.dp.size,
            epochs=1,
            collate=self.collate,
        )
        for _, micro_batches in zip(range(limit), data, strict=False):
            total += run_batch(self.chunks, micro_batches, self.mesh, self.task.forward, train=False)
        return total.mean

    def save(self) -> Path:
        """Write a checkpoint of this step; collective."""
        gather_parameters(self.chunks)
        keep = self.recipe.checkpoint.keep
        return native.save(self.checkpoints, self.state, self.progress, assets=self.folder / ASSETS, keep=keep)

    def how_to_continue(self) -> str:
        """Say where an interrupted run stands."""
        step = f"at step {self.progress.step} of {self.recipe.train.steps}"
        newest = native.latest(self.checkpoints)  # the disk knows; the run may have been interrupted while it saved
        if newest is None:
            return f"{step}; nothing was saved yet, the same command starts again"
        return f"{step}; the same command continues after step {newest.name.removeprefix('step_')}"

    def stands(self, function: str) -> str:
        """Say how far the run is, in one of its functions; told of a rank when the job fails."""
        progress: Progress | None = vars(self).get("progress")
        if progress is None or function == "__init__":
            return "at the start of the run"
        places = {
            "save": f"while step {progress.step} was saved",
            "evaluate": f"in the evaluation after step {progress.step}",
            "close": "at the end of the run",
        }
        return places.get(function, f"in step {progress.step + 1}")

    def close(self) -> None:
        """Give back the process groups and the folder."""
        self.mesh.close()
        if self._lock is not None:
            os.close(self._lock)

    def _step(self, data: Iterator[list[dict[str, torch.Tensor]]], meter: Meter | None) -> Loss:
        started = time.perf_counter()
        optim, lr = self.recipe.optim, self.schedule.lr_at(self.progress.step)
        set_lr(self.optimizer, lr, optim.weight_decay)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = run_batch(self.chunks, next(data), self.mesh, self.task.forward, train=True)
        _made, grad_norm, _ = self.optimizer.step()
        step = self.progress.step + 1
        if not (math.isfinite(loss.mean) and math.isfinite(grad_norm)):
            raise InputError(
                f"step {step}: the loss is {loss.mean:.4g} and the norm of its gradient {grad_norm:.4g}: the run has diverged. "
                f"Lower optim.lr (now {lr:.3g}) or lengthen optim.warmup. It stopped {self.how_to_continue()}"
            )
        self.device.synchronize()
        self.progress = Progress(
            step=step,
            samples=self.progress.samples + self.recipe.batch.total,
            tokens=self.progress.tokens + loss.tokens,
        )
        if meter:
            meter.step(
                {
                    "step": step,
                    "loss": loss.mean,
                    "grad_norm": float(grad_norm),
                    "lr": lr,
                    "tokens_per_s": round(loss.positions / (time.perf_counter() - started), 1),
                    "samples": self.progress.samples,
                    "tokens": self.progress.tokens,
                    **loss.terms,
                }
            )
        return loss

    def _evaluate(self, meter: Meter | None) -> None:
        valid_loss = self.evaluate()
        if meter:
            meter.evaluation(self.progress.step, valid_loss)

    def _batches(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        return batches(
            self.train_data,
            micro=self.recipe.batch.micro,
            global_batch=self.recipe.batch.total,
            dp_rank=self.mesh.dp.rank,
            dp_size=self.mesh.dp.size,
            start_samples=self.progress.samples,
            seed=self.recipe.train.seed,
            shuffle=self.task.shuffle and not isinstance(self.train_data, BlendedSamples),
            collate=self.collate,
        )

    def _meter(self) -> AbstractContextManager[Meter | None]:
        if not self.mesh.is_main:
            return nullcontext()
        return Meter(self.folder, self.recipe.log, start=self.progress.step, steps=self.recipe.train.steps)

    def _profiled(self) -> AbstractContextManager[profiling.Step]:
        config, folder = self.recipe.profile, self.folder / "profile"
        if config is not None and config.folder is not None:
            folder = config.folder
        return profiling.profiled(config, self.device, folder, rank=self.mesh.rank, first=self.progress.step + 1)

    def _resumed(self) -> Path | None:
        newest = native.latest(self.checkpoints)
        if newest is not None and self.recipe.checkpoint.resume == "never":
            raise InputError(
                f"checkpoint.folder={self.folder}: holds a run already ({newest.name}); "
                "name another folder, or continue it with checkpoint.resume=auto"
            )
        return newest

    def _build(self, *, random: bool) -> list[torch.nn.Module]:
        """Return the model, with the weights it starts from unless a checkpoint of the run brings them."""
        model, seed = self.model, self.recipe.train.seed
        chunks = build_model(
            model.arch,
            self.mesh,
            precision=self.recipe.precision,
            kernels=select(self.device, self.recipe.kernels),
            experts=self.recipe.experts,
            memory=self.recipe.memory,
            variable_seq_lengths=self.task.varies_under(self.recipe),
        )
        if random:
            tensors = model.checkpoint.tensors if model.checkpoint else random_tensors(model.family, model.arch, seed)
            load_weights(chunks, tensors, model.family, model.arch, self.mesh)
        else:
            mark(chunks, model.family, model.arch)
            with torch.no_grad():  # rows that pad the vocabulary are in no checkpoint
                for chunk in chunks:
                    for parameter in chunk.parameters():
                        parameter.zero_()
        return chunks

    def _write_down(self) -> None:
        """Leave in the run folder what the run is: the resolved recipe, the versions, the small files of the model."""
        _replace(self.folder / "recipe.yaml", recipes.dump(self.recipe))
        versions = {"python": sys.version.split()[0]}
        for name in SHOWN:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        _replace(self.folder / "versions.json", json.dumps(versions, indent=2) + "\n")
        aside = self.folder / f"{ASSETS}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            write_assets(self.model, aside, precision=self.recipe.precision)
            shutil.rmtree(self.folder / ASSETS, ignore_errors=True)
            aside.rename(self.folder / ASSETS)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _lock(folder: Path) -> int:
    """Make the run folder this process's own until it ends; the kernel frees it even after SIGKILL."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"checkpoint.folder={folder}: another run is writing there; wait for it or name another folder"
        ) from None
    return handle
