"""Garbage collection and the release of cached memory on chosen events."""

import gc
import weakref

import pytest
import torch
from ignite.engine import Engine, Events
from toys import batches, trainer_of

from camshaft import EmptyCache


class Cycle:
    def __init__(self):
        self.me = self


def collected(engine, run, **options):
    """The epochs after which a reference cycle that was made at the start of the epoch had been collected."""
    gone, kept = [], {}
    gc.disable()
    try:
        EmptyCache(**options).attach(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: kept.update(ref=weakref.ref(Cycle())))
        engine.add_event_handler(
            Events.EPOCH_STARTED(after=1) | Events.COMPLETED, lambda e: gone.append(kept["before"]() is None)
        )
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: kept.update(before=kept["ref"]))
        run(engine)
    finally:
        gc.enable()
    return gone


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [True, True, True]), ({"every": Events.EPOCH_COMPLETED(every=2)}, [False, True, False])],
    ids=["each epoch", "every second"],
)
def test_it_collects_on_the_chosen_events(options, expected):
    assert collected(trainer_of(), lambda e: e.run(batches(1), max_epochs=3), **options) == expected


def test_it_works_on_a_plain_ignite_engine():
    engine = Engine(lambda engine, batch: None)
    assert collected(engine, lambda e: e.run([0], max_epochs=2)) == [True, True]


def test_on_a_device_it_releases_the_cache(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(True))
    EmptyCache().empty(None)
    assert calls == [True]


def test_an_argument_that_is_not_an_event_is_an_error():
    with pytest.raises(TypeError, match="expected an event such as"):
        EmptyCache(every="epoch")
