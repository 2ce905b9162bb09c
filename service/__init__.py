"""The HTTP API, the command line and the Python client of Afterimage."""

from importlib.metadata import version

__version__ = version("afterimage")
