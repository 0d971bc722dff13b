"""Imported once by the fork server of `tests.harness`: what every rank needs and is slow to load."""

import contextlib
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed

torch.set_num_threads(1)

try:  # Megatron must be loaded through our hook, never before it
    device = importlib.import_module("mindspeed_core.device").Device.open("cpu")
    importlib.import_module("mindspeed_core.megatron").load(device)
    for name in ("models.gpt", "distributed", "optimizer", "pipeline_parallel", "dist_checkpointing"):
        importlib.import_module(f"megatron.core.{name}")
except ImportError as error:  # the tests that need it will say so themselves
    print(f"tests.preload: {error}")

# What the first optimizer, tokenizer and training run of a rank would otherwise each load for themselves. A package that
# is not installed is not tested either.
for name in (
    "torch._dynamo",
    "transformers.tokenization_utils_fast",
    "mindspeed_core.models.model",
    "mindspeed_train.trainer",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
