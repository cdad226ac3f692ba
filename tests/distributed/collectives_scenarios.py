"""Scenarios of the collectives."""

from typing import Any

from scenarios import error_of, rank, scenario

from camshaft.checkpoints.files import CheckpointError
from camshaft.distributed.collectives import on_rank_zero


class LocatedError(ValueError):
    """An error that is made from two arguments."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(f"{text} in line {line}")


@scenario()
def actions_on_rank_zero() -> Any:
    """The result and the errors of actions, each followed by one that succeeds."""
    ranks: list[int] = []

    def act() -> dict[str, int]:
        ranks.append(rank())
        return {"rank": rank()}

    def failing(error: Exception) -> str:
        def action() -> None:
            raise error

        text = error_of(lambda: on_rank_zero(action))
        return f"{text}, then {on_rank_zero(rank)}"

    class LocalError(FileNotFoundError):
        """An error that cannot be pickled."""

    return {
        "result": on_rank_zero(act),
        "ran on": ranks,
        "checkpoint": failing(CheckpointError("a.pt is damaged")),
        "os": failing(OSError(28, "No space left on device", "a.pt")),
        "local": failing(LocalError("no a.pt")),
        "arguments": failing(LocatedError("a word", 3)),
        "no text": failing(ValueError()),
        "not picklable": error_of(lambda: on_rank_zero(lambda: lambda: None)),
    }
