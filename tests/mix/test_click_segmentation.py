"""A segmenter that takes clicks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix.probabilistic_attention.layer import ProbabilisticAttention
from cenote.mix.probabilistic_attention.segmenter import (
    AxialProbabilisticAttention,
    Click,
    ClickSegmenter,
    ClickSession,
    click_map,
    clicks_needed,
    iou,
    iou_by_click,
    next_click,
    pasted,
    train_clicks,
    unlabelled_accuracy,
)


def squares(items: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Bright squares, some of which are the object: which can only be told."""
    generator = torch.Generator().manual_seed(0)
    images, masks = torch.rand(items, 1, size, size, generator=generator) * 0.2, torch.zeros(items, size, size).bool()
    for i in range(items):
        row, column = (int(torch.randint(0, size - 8, (1,), generator=generator)) for _ in range(2))
        images[i, 0, row : row + 6, column : column + 6] += 1
        masks[i, row : row + 6, column : column + 6] = True
    return images, masks


def test_rows_and_columns_are_attended_to_for_themselves() -> None:
    torch.manual_seed(0)
    x, clicks = torch.randn(1, 8, 4, 6), torch.zeros(1, 1, 4, 6)
    for columns in (False, True):
        layer = AxialProbabilisticAttention(8, 2, columns)
        layer.norm = torch.nn.Identity()
        before = layer(x, clicks)
        other = x.clone()
        other[:, :, 0, 0] += 1
        changed = (layer(other, clicks) - before).abs().amax(1)[0] > 1e-6
        expected = torch.zeros(4, 6, dtype=torch.bool)
        expected[(slice(None), 0) if columns else (0, slice(None))] = True
        assert torch.equal(changed, expected)
        turned = AxialProbabilisticAttention(8, 2, not columns)
        turned.norm = torch.nn.Identity()
        turned.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(turned(x.mT, clicks.mT).mT, before)


def test_a_click_changes_the_mask_and_undo_takes_it_back() -> None:
    torch.manual_seed(0)
    model = ClickSegmenter(1, 8, 2, rounds=2).eval()
    image = torch.rand(1, 16, 16)
    session = ClickSession(model, image)
    first = session.mask
    logits = [model(image[None], click_map([c], (16, 16))) for c in ([], [Click(3, 4, True)], [Click(3, 4, False)])]
    assert torch.equal(first, logits[0][0, 0] > 0)
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])
    assert torch.equal(session.click(3, 4, True), logits[1][0, 0] > 0)
    assert torch.equal(session.undo(), first)
    assert not session.clicks
    with pytest.raises(InputError, match="undo: there is no click"):
        session.undo()
    with pytest.raises(InputError, match="row, column: expected a pixel"):
        session.click(16, 0, True)
    with pytest.raises(InputError, match="images: expected sides that are multiples of 4"):
        model(torch.rand(1, 1, 15, 16))


def test_clicks_fall_in_the_middle_of_the_largest_error() -> None:
    truth, mask = torch.zeros(12, 12, dtype=torch.bool), torch.zeros(12, 12, dtype=torch.bool)
    truth[1:6, 1:6] = True
    mask[8:10, 8:10] = True
    assert next_click(mask, truth) == Click(3, 3, True)
    mask[1:6, 1:6] = True
    row, column, positive = next_click(mask, truth) or Click(0, 0, True)
    assert (row in (8, 9), column in (8, 9), positive) == (True, True, False)
    assert next_click(truth, truth) is None
    assert iou(mask, truth) == 25 / 29
    assert iou(truth & ~truth, truth & ~truth) == 1.0


def test_training_with_clicks_lowers_the_loss_and_clicks_are_counted() -> None:
    torch.manual_seed(0)
    images, masks = squares(8)
    model = ClickSegmenter(1, 8, 2)
    losses = train_clicks(model, images, masks, 25, batch=4, most=1, lr=2e-2)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(p.grad is not None for p in model.parameters())
    found = iou_by_click(model, images[:2], masks[:2], clicks=2)
    assert found.shape == (2, 3)
    assert clicks_needed(found, 0.0).tolist() == [0.0, 0.0]
    assert torch.isinf(clicks_needed(found, 1.01)).all()


def test_accuracy_is_of_tokens_that_nobody_labelled() -> None:
    labels, known = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[True, False, False, True]])
    output = torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1]]), 2).mT[:, None].float()
    assert unlabelled_accuracy(output, labels, known).tolist() == [0.5]
    assert unlabelled_accuracy(output, labels, torch.ones_like(known)).isnan().all()


def test_pasted_values_are_those_that_are_known() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    known = torch.zeros(1, 1, 3, 4)
    known[..., 1] = torch.tensor([5.0, 6.0, 1.0])
    held = pasted(v, known)
    assert held[0, 0, :, 1].tolist() == [5.0, 6.0]
    assert torch.equal(held[..., [0, 2, 3]], v[..., [0, 2, 3]])
    assert not torch.allclose(ProbabilisticAttention()(q, k, held), ProbabilisticAttention()(q, k, v))
