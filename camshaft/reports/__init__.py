"""What a trainer says of itself: its cycle, and what would make it faster."""

__all__: list[str] = []
