"""Captures graphs on the CPU, with a stand-in for CUDA graphs."""

import pytest
from fake_graphs import TapeRecorder

from camshaft.cudagraphs import graphs


@pytest.fixture(autouse=True)
def _fake_graphs(monkeypatch):
    monkeypatch.setitem(graphs.CAPTURERS, "cpu", TapeRecorder)
    monkeypatch.setattr(TapeRecorder, "made", 0)
    monkeypatch.setattr(TapeRecorder, "replays", 0)
