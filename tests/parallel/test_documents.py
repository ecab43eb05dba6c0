"""Packed rows as collators give them: boundaries for flash attention beside positions that begin again."""

import pytest
import torch
from models import CONFIGS
from transformers import AutoModel, DataCollatorWithFlattening

from ds_minis.parallel.attention.documents import OF_DOCUMENTS, positions_and_documents
from ds_minis.parallel.attention.masks import Refused

TEXTS = [{"input_ids": [5] * length} for length in (3, 1, 4)]


@pytest.fixture(scope="module")
def decoder():
    return AutoModel.from_config(CONFIGS["llama"]())


def collated() -> dict:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = dict(collate(TEXTS)) | {"use_cache": False}
    assert batch.keys() > OF_DOCUMENTS  # all that transformers' collator knows
    return batch


def documents_of(decoder, batch: dict) -> torch.Tensor:
    return positions_and_documents(decoder, batch, 1, 8, torch.device("cpu"))[1]


def test_documents_are_told_by_positions_that_agree_with_the_boundaries(decoder):
    documents = documents_of(decoder, collated())
    assert documents.unique_consecutive(return_counts=True)[1].tolist() == [3, 1, 4]


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_other_boundaries_are_refused(decoder, name):
    other = torch.tensor([0, 2, 4, 8]) if name != "seq_idx" else torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2]])
    with pytest.raises(Refused, match=f"{name} and position_ids tell other documents apart"):
        documents_of(decoder, collated() | {name: other})


@pytest.mark.parametrize(
    ("change", "how"),
    [({"position_ids": None}, "without position_ids"), ({"attention_mask": torch.ones(1, 8)}, "beside attention_mask")],
)
def test_boundaries_that_positions_do_not_tell_are_refused(decoder, change, how):
    with pytest.raises(Refused, match=f"cu_seq_lens_q was given {how}"):
        documents_of(decoder, collated() | change)
