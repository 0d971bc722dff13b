"""Pretraining and fine-tuning of language models on Ascend NPUs."""

from importlib.metadata import version

__version__ = version("mindspeed-train")
