"""A stand-in for a device that is behind the host: its copies arrive when the test says so, and every wait is counted."""

from camshaft import readback


class SlowCopies:
    """Replaces the copies to the host; install it with :meth:`install`."""

    def __init__(self):
        self.started = self.arrived = 0
        """The numbers of copies that were started, and that have arrived."""
        self.waits = 0
        """How often the host has waited for one that had not arrived."""

    def install(self, monkeypatch):
        monkeypatch.setattr(readback, "ASYNCHRONOUS", ("cpu",))
        monkeypatch.setattr(readback, "copy_to_host", self.copy)
        return self

    def copy(self, numbers):
        self.started += 1
        return numbers.clone(), Arrival(self, self.started)

    def arrive(self):
        """Lets every copy arrive that was started."""
        self.arrived = self.started


class Arrival:
    """The event of one copy."""

    def __init__(self, copies, number):
        self.copies, self.number = copies, number

    def query(self):
        return self.copies.arrived >= self.number

    def synchronize(self):
        self.copies.waits += not self.query()
        self.copies.arrived = max(self.copies.arrived, self.number)
