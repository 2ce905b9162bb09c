"""Picture files: their formats and colours, and the child processes that read them."""
