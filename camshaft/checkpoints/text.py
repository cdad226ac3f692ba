"""Text from files, before it is shown: it could hold control characters, which a terminal would obey."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, limit: int = 2000) -> str:
    """A text with everything that is not printable escaped (control characters, line ends, writing directions), and cut.

    Example:
        >>> printable("step\\x1b[31m"), printable("a" * 9, limit=4)
        ('step\\\\x1b[31m', 'aaaa...')
    """
    shown = text if len(text) <= limit else text[:limit] + "..."
    if shown.isprintable():
        return shown
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode("ascii") for part in shown)
