"""What several tests share: running services, stores and workers, factories, and waiting."""
