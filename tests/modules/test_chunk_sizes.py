"""How many rows go into one chunk."""

import pytest

from ds_minis.config import MiniSequenceConfig
from ds_minis.tiling.modules.state import Chunking


def chunking(hidden_size=512, **settings):
    return Chunking(MiniSequenceConfig(**settings), hidden_size)


@pytest.mark.parametrize(
    ("settings", "num_rows", "width", "rows"),
    [
        ({"chunk_size": 100}, 8192, 512, 100),
        ({"chunk_size": 100}, 8192, 64, 800),  # heads of 64: eight of them are a token
        ({"chunk_size": 100}, 8192, 1408, 100),
        ({"num_mini_sequences": 4}, 8192, 512, 2048),
        ({"num_mini_sequences": 4}, 8193, 512, 2049),  # never more than four
        ({"num_mini_sequences": 4}, 3, 512, 1),
        ({"num_mini_sequences": 1}, 8192, 512, 8192),
        ({}, 8192, 512, 1024),
        ({"hidden_size": 2048}, 8192, 2048, 2048),
        ({"hidden_size": 8192}, 100_000, 8192, 3072),
    ],
)
def test_rows_of_a_module(settings, num_rows, width, rows):
    assert chunking(**settings).module_rows(num_rows, width) == rows


@pytest.mark.parametrize(
    ("settings", "num_rows", "itemsize", "vocab_size", "rows"),
    [
        ({"loss_chunk_size": 7}, 8192, 4, 32000, 7),
        ({}, 65536, 4, 8192, 2048),  # half of the hidden states' bytes: 65536 * 512 / 8192 / 2
        ({}, 65536, 2, 8192, 2048),
        ({}, 1000, 4, 8192, 512),  # at least the hidden size
        ({"hidden_size": 64}, 1000, 4, 8192, 256),
        ({}, 10**7, 4, 131072, 1024),  # at most 512 MiB
        ({}, 10**7, 2, 131072, 2048),
        ({"hidden_size": 4096}, 8192, 2, 128256, 2092),
        ({}, 10**7, 4, 2**27, 1),
        ({}, 10**7, 4, 2**30, 1),
    ],
)
def test_rows_of_the_loss(settings, num_rows, itemsize, vocab_size, rows):
    chunks = chunking(**settings)
    hidden_bytes = num_rows * chunks.hidden_size * itemsize
    assert chunks.loss_rows(hidden_bytes, vocab_size * itemsize) == rows
