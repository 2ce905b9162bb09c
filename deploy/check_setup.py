"""Check that this Python can create the environment, before `make setup` downloads anything.

This file runs on any version of Python, so that users of old ones read which version is needed.
"""

import os
import platform
import shutil
import sys

VERSIONS = ((3, 11), (3, 12), (3, 13))


def fault():  # type: ignore[no-untyped-def]  # old Pythons have no annotations
    """What is missing, as one line; None if nothing is."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] not in VERSIONS:
        return (
            "Afterimage needs Python 3.11, 3.12 or 3.13, and this is " + version + "; "
            "choose another with make PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as e:
        package = "python" + version.rpartition(".")[0] + "-venv"
        return str(e) + ": install the system's package for venv, such as " + package
    wheels = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
    compilers = (os.environ.get("CXX") or "c++", "g++", "clang++")
    compared = sys.version_info < (3, 13)  # with CompressAI, which is installed to test
    if compared and not wheels and not any(map(shutil.which, compilers)):
        return (
            "there is no C++ compiler, and CompressAI has no wheel for this platform ("
            + platform.machine()
            + "); install one, such as the package g++"
        )
    return None


if __name__ == "__main__":
    sys.exit(fault())  # type: ignore[no-untyped-call]
