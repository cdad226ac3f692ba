"""Loaders with persistent workers live in cycles with their trainers; they end when those are collected."""

import gc

import pytest


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()
