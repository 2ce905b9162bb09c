"""`python -P -m service.cli`: the same as `afterimage`."""

import sys

from service.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
