"""`python -P -m worker.webhooks`: the process that sends webhooks."""

import sys

from worker.webhooks.sender import main

if __name__ == "__main__":
    sys.exit(main())
