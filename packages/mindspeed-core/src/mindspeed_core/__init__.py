"""Devices, parallelism, models, checkpoints and generation for training language models on Ascend NPUs."""

from importlib.metadata import version

__version__ = version("mindspeed-core")
