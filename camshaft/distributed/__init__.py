"""Several processes: collectives, gradient synchronization, shared decisions, and failures of other ranks."""

__all__: list[str] = []
