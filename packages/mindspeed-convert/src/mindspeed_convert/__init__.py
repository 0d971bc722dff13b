"""Weight conversion between Hugging Face, Megatron and native checkpoints."""

from importlib.metadata import version

__version__ = version("mindspeed-convert")
