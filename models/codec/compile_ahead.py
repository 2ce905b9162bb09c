"""Compile the entropy coder into numba's cache, in a process beside the import of weights.

`python -P -m models.codec.compile_ahead [context]`; with `context`, for context models, too.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from models.codec import architectures


@contextlib.contextmanager
def beside(model: str) -> Iterator[None]:
    """Compile during the block what the first decode with a model needs; wait for it at the end.

    What is in numba's cache already is not compiled. Without this, the first decode compiles it.
    """
    autoregressive = model and architectures.find(model).autoregressive
    command = [sys.executable, "-P", "-m", __name__, *(["context"] if autoregressive else [])]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        except BaseException:
            process.kill()
            raise


def main() -> int:
    """Compile, and return the exit status."""
    from models.codec import rans

    rans.warm_up()
    if "context" in sys.argv[1:]:
        from models.codec import context

        context.warm_up()
    return 0


if __name__ == "__main__":
    sys.exit(main())
