"""The structure of a file of ``torch.save``, checked before anything is allocated for it."""

from __future__ import annotations

import math
import zipfile
from typing import Any, BinaryIO

import torch
from torch.serialization import get_safe_globals

from camshaft.checkpoints.files import CheckpointError
from camshaft.checkpoints.pickle_scan import ALLOWANCE, Call, Global, scan_pickle

__all__ = ["check_archive", "dtype_of", "is_size"]

ITEM_SIZES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "QUInt8", "QInt8", "QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("Short", "Half", "BFloat16"), 2),
    **dict.fromkeys(("Int", "Float", "QInt32"), 4),
    **dict.fromkeys(("Long", "Double", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
"""The bytes of an element, by the type of the storage."""

LARGEST = 2**63 - 1
DIMENSIONS = 64

PLAIN_CALLS = {
    "_codecs.encode": (str, str),
    "builtins.complex": (float, float),
    "torch.Size": (tuple,),
    "torch.serialization._get_layout": (str,),
}
"""Functions that are harmless with arguments of these types."""


def check_archive(file: BinaryIO, archive: zipfile.ZipFile, *, is_foreign: bool) -> None:
    """Refuses a file whose entries overlap, are compressed or claim sizes that it does not have; runs no code.

    Args:
        file: the file.
        archive: the same as a zip file.
        is_foreign: whether others may have written it, so that the classes that ``torch.serialization.add_safe_globals`` was
            given are accepted.

    Raises:
        CheckpointError: says what is wrong, without the path.
    """
    sizes = entry_sizes(file, archive)
    folder = next(iter(sizes)).split("/", 1)[0] if sizes else ""
    if f"{folder}/data.pkl" not in sizes:
        raise CheckpointError("is no file of torch.save: it has no data.pkl")
    with archive.open(f"{folder}/data.pkl") as entry:
        data = entry.read()
    size = file.seek(0, 2)
    storages = {name.removeprefix(f"{folder}/data/"): length for name, length in sizes.items()}
    checks = _TensorChecks(storages, 2 * size + ALLOWANCE, registered_names() if is_foreign else frozenset())
    scan_pickle(data, checks.names, checks.call, checks.storage)


def entry_sizes(file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, int]:
    """The size of each entry by its name, if every entry has its own uncompressed bytes in the file."""
    sizes: dict[str, int] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise CheckpointError(f"is damaged or no checkpoint: its entry {entry.filename!r} is compressed")
        if entry.filename in sizes or entry.header_offset < end or (not sizes and entry.header_offset != 0):
            raise CheckpointError(f"is damaged or no checkpoint: its entry {entry.filename!r} overlaps another")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4" or header[8:10] != b"\0\0":
            raise CheckpointError(f"is damaged or no checkpoint: its entry {entry.filename!r} has no header")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        end = entry.header_offset + 30 + lengths + entry.file_size
        if end > archive.start_dir:
            raise CheckpointError(f"is damaged or no checkpoint: its entry {entry.filename!r} is larger than the file")
        sizes[entry.filename] = entry.file_size
    return sizes


def registered_names() -> frozenset[str]:
    """The names of the classes and functions that ``torch.load`` accepts in addition, because someone has registered them."""
    found = [item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in get_safe_globals()]
    return frozenset(found)


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of a name such as ``"torch.float32"``; ``None`` if it is none."""
    found = getattr(torch, name.removeprefix("torch."), None) if name.count(".") == 1 and name.startswith("torch.") else None
    return found if isinstance(found, torch.dtype) else None


def is_size(value: Any) -> bool:
    """Whether a value can be a tensor's shape, or its strides."""
    return (
        isinstance(value, (list, tuple))
        and len(value) <= DIMENSIONS
        and all(type(item) is int and 0 <= item <= LARGEST for item in value)
    )


class _Storage:
    """A storage that the file really has."""

    __slots__ = ("item_size", "size")

    def __init__(self, size: int, item_size: int) -> None:
        self.size, self.item_size = size, item_size


class _TensorChecks:
    """Checks each tensor in a pickle against the storages in the file.

    Args:
        sizes: the bytes of each storage by its name.
        limit: the bytes that a tensor may take, if it is copied.
        registered: further names that are accepted.
    """

    def __init__(self, sizes: dict[str, int], limit: int, registered: frozenset[str]) -> None:
        self.sizes, self.limit, self.registered = sizes, limit, registered

    def names(self, name: str) -> bool:
        """Whether a name belongs in a file of tensors and plain values."""
        return (
            name in CALLS
            or name in PLAIN_CALLS
            or name in self.registered
            or name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.device")
            or item_size_of(name) is not None
            or dtype_of(name) is not None
        )

    def storage(self, value: Any) -> _Storage:
        """A reference to a storage: ``("storage", type, name, device, number of elements)``."""
        if type(value) is not tuple or len(value) != 5 or value[0] != "storage" or type(value[1]) is not Global:
            raise CheckpointError("a storage in its pickle is malformed")
        _, kind, name, device, elements = value
        item_size = item_size_of(kind.name)
        if item_size is None or type(name) is not str or type(device) is not str or type(elements) is not int:
            raise CheckpointError("a storage in its pickle is malformed")
        if elements * item_size != self.sizes.get(name):
            raise CheckpointError(f"storage {name[:20]!r} has not the size that its pickle claims")
        return _Storage(elements * item_size, item_size)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """What a call in the pickle returns, as far as the checks need it."""
        if name in CALLS:
            return CALLS[name](self, *args)
        if name in PLAIN_CALLS:
            kinds = PLAIN_CALLS[name]
            if len(args) != len(kinds) or not all(isinstance(item, kind) for item, kind in zip(args, kinds, strict=True)):
                raise CheckpointError(f"its pickle calls {name} with other arguments than a checkpoint does")
            return Call(name, args)
        if name == "torch.device" and args and type(args[0]) is str:
            return Call(name, args)
        if name in self.registered:
            return Call(name, args)
        raise CheckpointError(f"holds more than tensors and plain values, and was not loaded: it calls {name!r}")

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Call:
        """``torch._utils._rebuild_tensor_v2`` and ``v3``: a tensor must lie inside its storage."""
        item_size = storage.item_size if type(storage) is _Storage else 0
        if len(rest) >= 3 and type(rest[2]) is Global and dtype_of(rest[2].name) is not None:
            item_size = dtype_of(rest[2].name).itemsize  # type: ignore[union-attr]
        if not item_size or type(offset) is not int or offset < 0 or not is_size(size) or not is_size(stride):
            raise CheckpointError("a tensor in its pickle is malformed")
        if len(size) != len(stride):
            raise CheckpointError(f"a tensor has {len(size)} dimensions, and {len(stride)} strides")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
        if math.prod(size) and last * item_size > storage.size:
            raise CheckpointError(f"a tensor of the shape {size} is larger than its storage of {storage.size} bytes")
        if math.prod(size) * item_size > self.limit or offset * item_size > storage.size:
            raise CheckpointError(f"a tensor of the shape {size} is larger than the file")
        return Call("tensor", ())

    def parameter(self, data: Any, *_: Any) -> Any:
        """A parameter is its tensor."""
        if type(data) is not Call:
            raise CheckpointError("a parameter in its pickle is no tensor")
        return data

    def sparse(self, layout: Any, parts: Any) -> Call:
        """A sparse tensor consists of other tensors, which have been checked; its indices are checked as it is loaded."""
        if type(layout) is not Call or type(parts) is not tuple:
            raise CheckpointError("a sparse tensor in its pickle is malformed")
        return Call("tensor", ())

    def typed(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor that has attributes, or is of a registered class."""
        if type(function) is not Global or type(args) is not tuple or type(kind) is not Global:
            raise CheckpointError("a tensor in its pickle is malformed")
        return self.call(function.name, args)

    def dictionary(self, *entries: Any) -> dict[Any, Any]:
        """``OrderedDict()``, ``OrderedDict(pairs)`` or ``Counter(dict)``."""
        if any(type(item) not in (dict, list) for item in entries):
            raise CheckpointError("a dict in its pickle is malformed")
        return dict(*entries)

    def collection(self, items: Any) -> Any:
        """``set(list)`` and ``bytearray(bytes)``, which must not be given a number."""
        if not isinstance(items, (list, bytes, str, Call)):
            raise CheckpointError("a set in its pickle is malformed")
        return list(items) if isinstance(items, list) else Call("bytes", ())


def item_size_of(name: str) -> int | None:
    """The bytes of an element of a storage such as ``"torch.FloatStorage"``; ``None`` if it is no storage."""
    if name == "torch.storage.UntypedStorage":
        return 1
    kind = name.removeprefix("torch.").removeprefix("cuda.")
    return ITEM_SIZES.get(kind.removesuffix("Storage")) if kind.endswith("Storage") and name.startswith("torch.") else None


CALLS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _TensorChecks.tensor,
    "torch._utils._rebuild_tensor_v3": _TensorChecks.tensor,
    "torch._utils._rebuild_parameter": _TensorChecks.parameter,
    "torch._utils._rebuild_parameter_with_state": _TensorChecks.parameter,
    "torch._utils._rebuild_sparse_tensor": _TensorChecks.sparse,
    "torch._tensor._rebuild_from_type_v2": _TensorChecks.typed,
    "collections.OrderedDict": _TensorChecks.dictionary,
    "collections.Counter": _TensorChecks.dictionary,
    "builtins.set": _TensorChecks.collection,
    "builtins.bytearray": lambda checks, items, *_: checks.collection(items),
}
"""What makes tensors and plain containers."""
