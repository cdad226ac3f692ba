"""Reports about a trainer: its training cycle, and what would make it faster."""

__all__: list[str] = []
