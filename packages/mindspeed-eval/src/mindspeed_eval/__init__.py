"""Evaluation of language models through lm-eval."""

from importlib.metadata import version

__version__ = version("mindspeed-eval")
