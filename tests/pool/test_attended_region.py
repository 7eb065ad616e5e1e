import pytest
import torch
from tests.pools import features, shaken

from cenote.core import InputError
from cenote.pool import CaiTPool, SimPool
from cenote.pool.attended_region import box_around, box_iou, mask_iou, object_scores, region


def test_a_region_holds_its_share_with_as_few_places_as_will_do() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(20, 5, 6, generator=generator).flatten(1).softmax(1).unflatten(1, (5, 6))
    for share in (0.1, 0.6, 1.0):
        kept = region(weights, share)
        held = (weights * kept).sum((1, 2))
        assert (held >= share - 1e-5).all()
        least = weights.masked_fill(~kept, 2).amin((1, 2))
        assert (held - least < share + 1e-5).all()
        assert (weights.masked_fill(kept, 0).amax((1, 2)) <= least).all()
    even = region(torch.full((2, 2), 0.25), 0.5)
    assert even.tolist() == [[True, True], [False, False]]
    assert not region(torch.zeros(2, 2)).any()
    for share in (0.0, 1.5):
        with pytest.raises(InputError, match="share"):
            region(weights, share)


def test_boxes_and_overlaps() -> None:
    mask = torch.zeros(3, 4, 8, dtype=torch.bool)
    mask[0, 1:3, 2:7] = True
    mask[1, 0, 0] = mask[1, 3, 7] = True
    boxes = box_around(mask)
    expected = [[0.25, 0.25, 0.875, 0.75], [0.0, 0.0, 1.0, 1.0], [0.0] * 4]
    assert boxes.tolist() == expected
    other = mask.roll(1, 2)
    torch.testing.assert_close(mask_iou(mask, other), torch.tensor([8 / 12, 0.0, 1.0]))
    torch.testing.assert_close(box_iou(boxes, box_around(other))[[0, 2]], torch.tensor([8 / 12, 1.0]))
    apart = torch.tensor([[0.0, 0.0, 0.2, 0.2]]), torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    assert box_iou(*apart).item() == 0


def test_scores_of_an_object_by_hand() -> None:
    weights = torch.tensor([[[0.4, 0.3, 0.0], [0.2, 0.1, 0.0]], [[0.0, 0.1, 0.9], [0.0, 0.0, 0.0]]])
    truth = torch.tensor([[[True, False, False], [True, False, False]], [[True, True, False], [False] * 3]])
    found = object_scores(weights, truth, 0.65)
    assert found.hit.tolist() == [1, 0]
    torch.testing.assert_close(found.mass, torch.tensor([0.6, 0.1]))
    torch.testing.assert_close(found.mask_iou, torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(found.box_iou, torch.tensor([1 / 3, 0.0]))
    with pytest.raises(InputError, match="truth"):
        object_scores(weights, torch.zeros_like(truth))
    with pytest.raises(InputError, match="truth"):
        object_scores(weights, truth[:, :1])


def test_pools_and_class_tokens_are_asked_in_one_way() -> None:
    """On images of two sizes, whose object is brighter than the rest."""
    for height, width in ((4, 6), (3, 5)):
        x = 0.1 * features(2, height * width, 16)
        truth = torch.zeros(2, height, width, dtype=torch.bool)
        truth[:, 1:3, 2:4] = True
        x[truth.flatten(1)] += 1
        even, simpool, class_token = shaken(SimPool(16)), shaken(SimPool(16)), shaken(CaiTPool(16, heads=1))
        with torch.no_grad():
            even.wq.weight.zero_()
        found = [
            object_scores(pool.attend(x).weights.mean(1).unflatten(-1, (height, width)), truth)
            for pool in (even, simpool, class_token)
        ]
        torch.testing.assert_close(found[0].mass, torch.full_like(found[0].mass, 4 / (height * width)))
        for scores in found:
            assert all(((v >= 0) & (v <= 1)).all() for v in scores)
        assert not torch.allclose(found[1].mass, found[2].mass)
