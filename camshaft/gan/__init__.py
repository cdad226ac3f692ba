"""The parts of a GAN: objectives, losses, gradient penalties."""

__all__: list[str] = []
