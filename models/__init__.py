"""The codec and the diffusion decoder; knows nothing of HTTP and Redis."""
