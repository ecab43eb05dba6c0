"""How many rows go into one chunk."""

import pytest

from ds_minis.config import MiniSequenceConfig
from ds_minis.tiling.chunking import Chunking


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
    ("settings", "num_rows", "vocab_size", "rows"),
    [
        ({"loss_chunk_size": 7}, 8192, 32000, 7),
        ({}, 65536, 8192, 4096),  # as large as the hidden states: 65536 * 512 / 8192
        ({}, 1000, 8192, 256),  # the floor
        ({}, 10**7, 131072, 512),  # the ceiling of 2**26 logits
        ({}, 10**7, 2**27, 1),
    ],
)
def test_rows_of_the_loss(settings, num_rows, vocab_size, rows):
    assert chunking(**settings).loss_rows(num_rows, vocab_size) == rows
