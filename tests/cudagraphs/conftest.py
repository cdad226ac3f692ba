"""Captures graphs on the CPU with a stand-in for CUDA graphs."""

import pytest
from fake_graphs import FakeCapturer

from camshaft.cudagraphs import graphs


@pytest.fixture(autouse=True)
def _fake_graphs(monkeypatch):
    monkeypatch.setitem(graphs.CAPTURERS, "cpu", FakeCapturer)
    monkeypatch.setattr(FakeCapturer, "captures", 0)
    monkeypatch.setattr(FakeCapturer, "replays", 0)
