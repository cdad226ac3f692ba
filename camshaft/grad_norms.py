"""The norms of gradients, computed once for every handler that asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from camshaft.distributed.dtensors import is_dtensor, local_tensor

__all__ = ["GradNorms"]


class GradNorms:
    """Computes norms of gradients, and remembers the latest ones while the gradients are unchanged.

    A handler that will compute a total norm says so with :meth:`expect`. Another handler that only needs to know whether the
    gradients are finite then computes the same norms in advance, and nothing is computed twice.

    Example:
        >>> gradients = [torch.ones(4), torch.zeros(2, 3)]
        >>> norms = GradNorms()
        >>> norms.each(gradients, 2.0)
        tensor([2., 0.])
        >>> norms.total(gradients, 2.0)
        tensor(2.)
    """

    def __init__(self) -> None:
        self._expected: list[float] = []
        self._order = 0.0
        self._each: torch.Tensor | None = None
        self._versions: list[tuple[torch.Tensor, int]] = []

    def expect(self, order: float) -> None:
        """Says that a handler is going to ask for the total norm of this order in every window."""
        self._expected.append(order)

    def unexpect(self, order: float) -> None:
        """Takes back one :meth:`expect`."""
        if order in self._expected:
            self._expected.remove(order)

    @property
    def expected_order(self) -> float:
        """The order of the norm that a handler is going to ask for; infinity, whose norm cannot overflow, if none is."""
        return self._expected[0] if self._expected else float("inf")

    def each(self, gradients: Sequence[torch.Tensor], order: float) -> torch.Tensor:
        """The norm of each gradient.

        Args:
            gradients: at least one dense, sparse or distributed tensor. Of a distributed one only the local part counts.
            order: the order of the norm. A gradient that is not finite has a norm that is not finite in any order.

        Returns:
            A tensor of shape ``(len(gradients),)``, on the device of the first gradient.
        """
        entries = [values(gradient) for gradient in gradients]
        nonempty = [entry if entry.numel() else entry.new_zeros(1) for entry in entries]
        device = nonempty[0].device
        self._each = torch.stack([norm.to(device) for norm in torch._foreach_norm(nonempty, order)])
        self._order, self._versions = order, [(gradient, gradient._version) for gradient in gradients]
        return self._each

    def total(self, gradients: Sequence[torch.Tensor], order: float) -> torch.Tensor:
        """The norm of all gradients together, bit for bit as ``torch.nn.utils.get_total_norm`` computes it.

        Args:
            gradients: the gradients.
            order: the order of the norm.

        Returns:
            A scalar tensor.
        """
        if self._each is None or order != self._order or not self._are_current(gradients):
            return nn.utils.get_total_norm(gradients, order)
        total: torch.Tensor = torch.linalg.vector_norm(self._each, order)
        return total

    def clear(self) -> None:
        """Forgets the norms, and releases the gradients."""
        if self._each is not None:
            self._each, self._versions = None, []

    def _are_current(self, gradients: Sequence[torch.Tensor]) -> bool:
        """Whether the known norms are those of these gradients, and torch would compute them in one group."""
        if len(gradients) != len(self._versions):
            return False
        first = gradients[0]
        for gradient, (known, version) in zip(gradients, self._versions, strict=True):
            if gradient is not known or gradient._version != version or not is_grouped_with(gradient, first):
                return False
        return True


def values(gradient: torch.Tensor) -> torch.Tensor:
    """The local entries of a gradient."""
    local = local_tensor(gradient).detach()
    return local._values() if local.is_sparse else local


def is_grouped_with(gradient: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether two gradients are dense, local, and of one device and dtype, so that torch puts them in one group."""
    same_group = gradient.device == first.device and gradient.dtype == first.dtype
    return same_group and not gradient.is_sparse and gradient.numel() > 0 and not is_dtensor(gradient)
