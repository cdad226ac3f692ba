"""What a resumed run continues from: the state of a trainer, and the position in its data."""

__all__: list[str] = []
