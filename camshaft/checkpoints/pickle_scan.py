"""Reads a pickle without running anything in it: names and calls become inert records that the caller checks.

Python's own unpickler imports what a pickle names, calls it and sets its attributes. The one here does none of that. It keeps
the amount of memory that a file may ask for within bounds, too.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from typing import Any, cast

from camshaft.checkpoints.files import CheckpointError

__all__ = ["Call", "Global", "scan_pickle"]

ALLOWANCE = 256 << 20
"""The bytes that a file may take in memory in addition to twice its size: small objects take more there than in a file."""

DEPTH = 100
"""The deepest nesting that is accepted."""

SCALARS = (str, int, float, bool, bytes, type(None))


class Global:
    """A name in a pickle, such as ``torch.FloatStorage``. Nothing is imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Call:
    """A call or a new object in a pickle, which is not made."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args
        self.state: Any = None
        """What the pickle wants to set on the result."""


OnCall = Callable[[str, tuple[Any, ...]], Any]


def scan_pickle(data: bytes, names: Callable[[str], bool], on_call: OnCall, on_storage: Callable[[Any], Any]) -> Any:
    """Reads a pickle into plain values, :class:`Global` and :class:`Call`.

    Args:
        data: the pickle.
        names: whether a name such as ``"torch.FloatStorage"`` is accepted.
        on_call: receives the name and the arguments of a call; returns what takes the place of the result.
        on_storage: the same for a reference to a storage.

    Raises:
        CheckpointError: if it names anything else, takes too much memory, or is damaged.
    """
    machine = _Machine(2 * len(data) + ALLOWANCE, names, on_call, on_storage)
    try:
        value = machine.run(data)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"its pickle is damaged ({type(error).__name__}: {error})") from error
    check_nesting(value, 10_000 + 10 * len(data))
    return value


def check_nesting(value: Any, limit: int) -> None:
    """Refuses values that contain themselves, are nested too deeply, or repeat an entry so often that a walk takes forever."""
    waiting, visited = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        visited += 1
        if depth > DEPTH or visited > limit:
            raise CheckpointError("its values are nested too deeply, or contain themselves")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, (list, tuple, set)):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, Call) and item.state is not None:
            waiting.append((item.state, depth + 1))


class _Machine:
    """The pickle machine. Each method is named for its opcode."""

    def __init__(self, budget: int, names: Callable[[str], bool], on_call: OnCall, on_storage: Callable[[Any], Any]) -> None:
        self.budget, self.names, self.on_call, self.on_storage = budget, names, on_call, on_storage
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                break
            if name in VALUES:
                self.push(argument, 40 + (len(argument) if isinstance(argument, (str, bytes)) else 0))
            elif name in MAKERS:
                self.push(MAKERS[name](), 72)
            elif name in GETS:
                self.push(self.memo[cast(int, argument)], 8)
            elif name in PUTS:
                self.memo[argument if argument is not None else len(self.memo)] = self.stack[-1]
            elif name not in IGNORED:
                self.step(name, argument)
        (value,) = self.stack
        return value

    def push(self, value: Any, cost: int) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise CheckpointError("its values take too much memory")
        self.stack.append(value)

    def step(self, name: str, argument: Any) -> None:
        method = getattr(self, name, None) if name in STEPS else None
        if method is None:
            raise CheckpointError(f"its pickle has the instruction {name}, which a checkpoint never needs")
        method(argument)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def MARK(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def TUPLE(self, _: Any) -> None:
        self.push(tuple(self.pop_mark()), 56)

    def TUPLE1(self, _: Any) -> None:
        self.push((self.stack.pop(),), 48)

    def TUPLE2(self, _: Any) -> None:
        second = self.stack.pop()
        self.push((self.stack.pop(), second), 56)

    def TUPLE3(self, _: Any) -> None:
        third, second = self.stack.pop(), self.stack.pop()
        self.push((self.stack.pop(), second, third), 64)

    def APPEND(self, _: Any) -> None:
        self.extend([self.stack.pop()])

    def APPENDS(self, _: Any) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise CheckpointError("its pickle appends to what is no list")
        target.extend(items)

    def SETITEM(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def SETITEMS(self, _: Any) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise CheckpointError("its pickle sets entries of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            parts = key if type(key) is tuple else (key,)
            if not all(isinstance(part, (*SCALARS, Call)) for part in parts):
                raise CheckpointError(f"a dict has a key of the type {type(key).__name__}")
            target[key] = value

    def GLOBAL(self, argument: str) -> None:
        self.push_global(argument.replace(" ", ".", 1))

    def STACK_GLOBAL(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_global(f"{module}.{name}")

    def push_global(self, name: str) -> None:
        name = re.sub("^__builtin__[.]", "builtins.", name)  # as Python 2 called it; torch.save writes that
        if not self.names(name):
            raise CheckpointError(f"holds more than tensors and plain values, and was not loaded: it names {name[:100]!r}")
        self.push(Global(name), 64)

    def REDUCE(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise CheckpointError("its pickle calls what is no function")
        self.push(self.on_call(function.name, args), 72)

    NEWOBJ = REDUCE

    def BUILD(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Call and target.state is None:
            target.state = state
        elif not (type(target) is dict and type(state) is dict and set(state) == {"_metadata"}):  # of a module's state dict
            raise CheckpointError("its pickle sets attributes")

    def BINPERSID(self, _: Any) -> None:
        self.push(self.on_storage(self.stack.pop()), 72)


VALUES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
                    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})  # fmt: skip
MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
GETS = frozenset({"BINGET", "LONG_BINGET"})
PUTS = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})
IGNORED = frozenset({"PROTO", "FRAME"})
STEPS = frozenset({"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL",
                   "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"})  # fmt: skip
