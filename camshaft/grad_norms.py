"""The norms of gradients, taken once for all who ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from camshaft.distributed.dtensors import is_dtensor, local_tensor

__all__ = ["Norms"]


class Norms(NamedTuple):
    """The norm of each of some gradients.

    Example:
        >>> gradients = [torch.ones(4), torch.zeros(2, 3)]
        >>> norms = Norms.of(gradients, 2.0)
        >>> norms.each
        tensor([2., 0.])
        >>> norms.total(gradients, 2.0)
        tensor(2.)
    """

    order: float
    each: torch.Tensor
    """One number for each gradient, on the device of the first; of a split gradient that of this process's part."""
    known: list[tuple[torch.Tensor, int]]
    """The gradients, and how often each had been changed when its norm was taken."""

    @classmethod
    def of(cls, gradients: Sequence[torch.Tensor], order: float) -> Norms:
        """Takes the norms of at least one gradient; whether any entry isn't finite shows in every one of them.

        Args:
            gradients: dense, sparse or split ones.
            order: of the norm; where it is infinite no sum can overflow.
        """
        entries = [values(gradient) for gradient in gradients]
        some = [part if part.numel() else part.new_zeros(1) for part in entries]
        device = some[0].device
        each = torch.stack([norm.to(device) for norm in torch._foreach_norm(some, order)])
        return cls(order, each, [(gradient, gradient._version) for gradient in gradients])

    def total(self, gradients: Sequence[torch.Tensor], order: float) -> torch.Tensor | None:
        """The norm of all gradients together, by the very sums of ``torch.nn.utils.get_total_norm``.

        Args:
            gradients: whose norm is wanted.
            order: of the norm.

        Returns:
            A scalar tensor; ``None`` where other norms were taken, a gradient has changed since, or torch would sum in another
            order.
        """
        if order != self.order or len(gradients) != len(self.known):
            return None
        first = gradients[0]
        for gradient, (known, version) in zip(gradients, self.known, strict=True):
            if gradient is not known or gradient._version != version or not is_like(gradient, first):
                return None
        total: torch.Tensor = torch.linalg.vector_norm(self.each, order)
        return total


def values(gradient: torch.Tensor) -> torch.Tensor:
    """The entries of a gradient that are here."""
    held = local_tensor(gradient).detach()
    return held._values() if held.is_sparse else held


def is_like(gradient: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether two gradients are whole, dense and of one kind, so that torch puts them in one sum."""
    one_kind = gradient.device == first.device and gradient.dtype == first.dtype
    return one_kind and not gradient.is_sparse and gradient.numel() > 0 and not is_dtensor(gradient)
