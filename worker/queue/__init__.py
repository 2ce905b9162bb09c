"""Jobs, their records and events in Redis: shared by the API and the workers."""
