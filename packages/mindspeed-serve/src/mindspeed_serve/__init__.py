"""Generation and chat in the terminal and on a web page."""

from importlib.metadata import version

__version__ = version("mindspeed-serve")
