"""The installed version of csulora."""

from importlib.metadata import version

__version__ = version("csulora")
