"""What helps a data loader: seeds, and batches fetched ahead."""

__all__: list[str] = []
