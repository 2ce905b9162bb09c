"""The HTTP API, the command line and the Python client of Afterimage."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("afterimage")
except PackageNotFoundError:  # the wheel of the client alone
    __version__ = version("afterimage-client")
