"""Seeds for a data loader, and batches fetched ahead."""

__all__: list[str] = []
