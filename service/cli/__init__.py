"""The command line, `afterimage`."""
