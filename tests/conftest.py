"""Skips, with the reason, what this machine cannot run."""

import psutil
import pytest
import torch

LARGE_GIB = 19


def pytest_collection_modifyitems(items):
    available = psutil.virtual_memory().available / 2**30
    for item in items:
        if "large" in item.keywords and available < LARGE_GIB:
            item.add_marker(pytest.mark.skip(reason=f"needs {LARGE_GIB} GiB of memory, {available:.0f} are free"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
