"""Several processes: collectives, gradient synchronization, agreed decisions, failures."""

__all__: list[str] = []
