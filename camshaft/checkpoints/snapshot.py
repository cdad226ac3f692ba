"""Copies of tensors in the memory of the host, taken without holding training up, in memory that is kept between saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from camshaft.pytree import is_strided, map_tensors

__all__ = ["Snapshot"]

RESERVE = 0.1
"""The part of a device's memory that must stay free when copies are kept there: training may need more later."""

DTYPES = frozenset(
    [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    ]
)
"""The types of elements that the kernels for lists of tensors support."""

Fetch = Callable[[], list[torch.Tensor]]
"""Waits for copies, and returns them in the memory of the host."""


class Snapshot:
    """Copies the tensors of one save at a time, and keeps the memory of the copies for the next save.

    Tensors on an accelerator are copied on the device, in the order of its current stream, and :meth:`take` does not wait for
    that; the function that it returns does, and moves the copies to pinned memory on a stream of its own. If the device has no
    room for the copies, they go to pinned memory directly, and what is queued after :meth:`take` waits for them on the device.
    Tensors of the CPU are copied at once. Sparse, sharded and other unusual tensors are copied without kept memory, and so is
    everything if there is no memory to keep.

    What is kept is the memory of one copy: on the host and, if there is room, on the device.

    Example:
        >>> snapshot, weights = Snapshot(), torch.zeros(2)
        >>> fetch = snapshot.take({"weights": weights})
        >>> _ = weights.fill_(7)
        >>> fetch()
        {'weights': tensor([0., 0.])}
    """

    def __init__(self) -> None:
        self._devices: dict[torch.device, _HostCopies | _DeviceCopies] = {}

    def take(self, content: Any) -> Callable[[], Any]:
        """Copies every tensor of a nest, which may change as soon as this returns.

        Args:
            content: tensors and plain values, as :func:`~camshaft.pytree.map_tensors` takes them.

        Returns:
            A function that waits for the copies and returns the nest with tensors in the memory of the host. It may run in
            another thread, once, and before the next :meth:`take`, which overwrites those tensors.
        """
        found: list[torch.Tensor] = []
        placeholder = torch.empty(0)  # the nest must not keep the tensors of the training

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor.detach())
            return placeholder

        nest = map_tensors(note, content)
        with torch.inference_mode(False), torch.no_grad():  # or what is made in inference mode could not be written later
            parts = self._copy(found)

        def fetch() -> Any:
            fetched = {place: tensor for places, wait in parts for place, tensor in zip(places, wait(), strict=True)}
            order = iter(range(len(fetched)))
            return map_tensors(lambda _: fetched[next(order)], nest)

        return fetch

    def release(self) -> None:
        """Frees the kept memory."""
        self._devices.clear()

    def _copy(self, found: list[torch.Tensor]) -> list[tuple[list[int], Fetch]]:
        """Copies tensors. Returns which of them are on each device, and the function that waits for those."""
        places: defaultdict[torch.device | None, list[int]] = defaultdict(list)
        for place, tensor in enumerate(found):
            places[tensor.device if is_usual(tensor) else None].append(place)
        for device in self._devices.keys() - places.keys():
            del self._devices[device]
        return [(chosen, self._copy_from(device, [found[place] for place in chosen])) for device, chosen in places.items()]

    def _copy_from(self, device: torch.device | None, sources: list[torch.Tensor]) -> Fetch:
        if device is not None:
            copies = self._devices.pop(device, None) or copies_of(device)
            try:
                if copies is not None:
                    fetch = copies.copy(sources)
                    self._devices[device] = copies
                    return fetch
            except (RuntimeError, MemoryError):  # no memory to keep: the plain copy needs less, and tells any other reason
                del copies
        plain = [plain_copy(source) for source in sources]
        return lambda: plain


class _Kept:
    """Tensors that are kept between saves, one for each of the last save.

    Args:
        make: makes a tensor with the shape, type and strides of another; it need not set its values.
    """

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.make = make
        self._kept: dict[Hashable, list[torch.Tensor]] = {}

    def like(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        """A tensor for each of ``sources``: a kept one if there is one like it. Those that are left over are freed first."""
        kept, self._kept = self._kept, {}
        found = [take_from(kept, source) for source in sources]
        kept.clear()
        made = [self.make(source) if target is None else target for source, target in zip(sources, found, strict=True)]
        for source, target in zip(sources, made, strict=True):
            self._kept.setdefault(layout(source), []).append(target)
        return made

    def missing(self, sources: list[torch.Tensor]) -> int:
        """How many bytes :meth:`like` would have to make."""
        kept = {key: list(targets) for key, targets in self._kept.items()}
        return sum(source.nbytes for source in sources if take_from(kept, source) is None)


class _HostCopies:
    """Copies of tensors of the CPU."""

    def __init__(self) -> None:
        self.host = _Kept(torch.empty_like)

    def copy(self, sources: list[torch.Tensor]) -> Fetch:
        """Copies at once."""
        targets = self.host.like(sources)
        copy_all(targets, sources)
        return lambda: targets


class _DeviceCopies:
    """Copies of tensors of one accelerator.

    Args:
        device: the device.
        module: torch's module for its type, such as ``torch.cuda``.
    """

    def __init__(self, device: torch.device, module: Any) -> None:
        self.device, self.module = device, module
        self.stream = module.Stream(device)
        self.staged, self.pinned = _Kept(torch.empty_like), _Kept(pinned_like)

    def copy(self, sources: list[torch.Tensor]) -> Fetch:
        """Queues the copies, and waits for nothing."""
        targets = self._stage(sources)
        if targets is None:
            self.staged = _Kept(torch.empty_like)
            return self._copy_directly(sources)
        copy_all(targets, sources)
        copied = self.module.current_stream(self.device).record_event()
        return lambda: self._fetch(targets, copied)

    def _stage(self, sources: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """Memory for the copies on the device; ``None`` if it has no room."""
        missing = self.staged.missing(sources)
        if missing and not has_room(self.device, self.module, missing):
            return None
        try:
            return self.staged.like(sources)
        except torch.OutOfMemoryError:
            return None

    def _fetch(self, staged: list[torch.Tensor], copied: Any) -> list[torch.Tensor]:
        """Moves the copies on the device to the host; runs in the thread that writes."""
        self.stream.wait_event(copied)
        with self.module.stream(self.stream):
            try:
                targets = self.pinned.like(staged)
            except (RuntimeError, MemoryError):  # pinned memory is scarcer than other memory, and here nobody waits
                return [plain_copy(tensor) for tensor in staged]
            for target, source in zip(targets, staged, strict=True):
                target.copy_(source, non_blocking=True)
        self.stream.record_event().synchronize()
        return targets

    def _copy_directly(self, sources: list[torch.Tensor]) -> Fetch:
        """Copies to the host on the stream of its own; what training queues later must not overwrite the sources before."""
        present = self.module.current_stream(self.device)
        targets = self.pinned.like(sources)
        self.stream.wait_stream(present)
        with self.module.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        copied = self.stream.record_event()
        present.wait_event(copied)

        def fetch() -> list[torch.Tensor]:
            copied.synchronize()
            return targets

        return fetch


def copies_of(device: torch.device) -> _HostCopies | _DeviceCopies | None:
    """What copies the tensors of a device; ``None`` for a device without streams of its own."""
    module = accelerator(device)
    if module is not None:
        return _DeviceCopies(device, module)
    return _HostCopies() if device.type == "cpu" else None


def accelerator(device: torch.device) -> Any:
    """Torch's module for the type of a device, if it has streams and tells how much memory is free; otherwise ``None``."""
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    return module if all(hasattr(module, name) for name in ("Stream", "stream", "current_stream", "mem_get_info")) else None


def has_room(device: torch.device, module: Any, size: int) -> bool:
    """Whether so many bytes more leave enough free memory on a device."""
    free, total = module.mem_get_info(device)
    return bool(free - size >= RESERVE * total)


def is_usual(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but its type, shape, strides and elements."""
    return type(tensor) is torch.Tensor and is_strided(tensor) and tensor.dtype in DTYPES and not unresolved(tensor)


def unresolved(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view that only stands for the conjugate or the negative of its memory."""
    return tensor.is_conj() or tensor.is_neg()


def plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A new copy on the host; waits for it."""
    return tensor.to("cpu", copy=True)


def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    """New pinned memory for a copy."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def layout(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that can be copied into the same memory."""
    return tensor.dtype, tensor.shape, tensor.stride()


def take_from(kept: dict[Hashable, list[torch.Tensor]], source: torch.Tensor) -> torch.Tensor | None:
    """Takes the first kept tensor for a copy of ``source``; ``None`` if there is none."""
    targets = kept.get(layout(source))
    return targets.pop(0) if targets else None


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copies tensors of one device, those of the same type in few launches."""
    groups: defaultdict[Hashable, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[source.dtype, target.stride() == source.stride()]  # one tensor with other strides slows its list down
        group[0].append(target)
        group[1].append(source)
    for into, of in groups.values():
        torch._foreach_copy_(into, of)
