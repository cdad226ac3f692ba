"""The step as CUDA graphs: captured once, replayed from then on."""

__all__: list[str] = []
