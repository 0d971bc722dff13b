"""Preprocessing of text and instruction data into Megatron files, and the data sets read from them."""

from importlib.metadata import version

__version__ = version("mindspeed-data")
