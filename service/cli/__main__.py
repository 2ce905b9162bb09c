"""`python -P -m service.cli` runs the `afterimage` command."""

from service.cli.main import run

if __name__ == "__main__":
    run()
