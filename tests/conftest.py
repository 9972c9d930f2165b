"""Tests train tiny models: one thread is fastest for them, and the same sums come out in every process."""

import importlib
import os

import pytest

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def transformers():
    """The library, or a skipped test; in continuous integration (REGROW_NO_SKIP=1) its absence is a failure."""
    if not os.environ.get("REGROW_NO_SKIP"):
        pytest.importorskip("transformers")
    return importlib.import_module("transformers")
