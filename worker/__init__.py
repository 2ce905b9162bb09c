"""Jobs, stores and the worker process."""
