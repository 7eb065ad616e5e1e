"""Padding in front gives what padding behind gives, or is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.context_broadcasting.live import broadcasting
from cenote.mix.density import density_of
from cenote.mix.normalization_limits.scan import HeadScan
from cenote.mix.ponet.model import PoNetClassifier, PoNetEncoder, PoNetForPretraining
from cenote.mix.rank_in_attention.transformer import RankTransformer

MASK = torch.tensor([[False, False, True, True, True, True]])
IDS = torch.tensor([[0, 0, 1, 5, 6, 2]])


@pytest.fixture
def encoder() -> PoNetEncoder:
    torch.manual_seed(0)
    return PoNetEncoder(9, dim=8, heads=2, depth=2, inner=8, longest=6, special=(1, 2)).eval()


@pytest.fixture
def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=9, **sizes)).eval()


@pytest.mark.parametrize("read", ["mean", "first"])
def test_ponet_reads_the_first_real_token(encoder: PoNetEncoder, read: Any) -> None:
    model = PoNetClassifier(encoder, 3, read).eval()
    torch.testing.assert_close(model(IDS), model(IDS[:, 2:]))
    torch.testing.assert_close(model(IDS, MASK), model(IDS[:, 2:], MASK[:, 2:]))


def test_ponet_tells_the_order_by_the_first_real_token(encoder: PoNetEncoder) -> None:
    model = PoNetForPretraining(encoder).eval()
    torch.testing.assert_close(model(IDS).order, model(IDS[:, 2:]).order)


@pytest.mark.parametrize("places", ["none", "added", "appended"])
def test_places_of_points_count_the_real_ones(places: Any) -> None:
    torch.manual_seed(0)
    model, x = RankTransformer(4, inner=4, places=places), torch.randn(1, 6, 4)
    torch.testing.assert_close(model(x, MASK)[:, 2:], model(x[:, 2:]))


def padded(*rows: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


INPUTS = padded([0, 0, 1, 5], [3, 4, 7, 2])


def test_broadcasting_takes_padding_from_the_inputs(bert: nn.Module) -> None:
    with torch.no_grad(), broadcasting(bert, INPUTS):
        found = bert(**INPUTS).last_hidden_state
    with torch.no_grad(), broadcasting(bert, INPUTS, mask=INPUTS["attention_mask"].bool()):
        assert torch.equal(found, bert(**INPUTS).last_hidden_state)
    with torch.no_grad(), broadcasting(bert, INPUTS, mask=torch.ones(2, 4, dtype=torch.bool)):
        assert not torch.equal(found, bert(**INPUTS).last_hidden_state)


def test_density_takes_padding_from_the_inputs(bert: nn.Module) -> None:
    for found, told in zip(
        density_of(bert, INPUTS), density_of(bert, INPUTS, INPUTS["attention_mask"].bool()), strict=True
    ):
        assert torch.equal(found.share, told.share)


def test_a_scan_of_heads_refuses_padding_and_what_has_no_length(bert: nn.Module) -> None:
    with pytest.raises(InputError, match="inputs: attention_mask tells of padding"):
        HeadScan(n=1).scan(bert, INPUTS)
    with pytest.raises(InputError, match="inputs: expected a tensor"):
        HeadScan(n=1).scan(bert, {})
    for length in (0, -3):
        with pytest.raises(InputError, match="lengths: expected at least 1"):
            HeadScan(n=1).scan(bert, {"input_ids": INPUTS["input_ids"]}, lengths=(length,))
