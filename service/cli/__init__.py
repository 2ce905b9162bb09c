"""The command line: `afterimage`."""
