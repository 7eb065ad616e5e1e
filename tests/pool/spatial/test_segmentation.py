import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import border_accuracy, border_f1, head_rates, label_counts, mean_iou, pixel_accuracy, poly_schedule
from cenote.pool.spatial.segmentation import near_borders


def maps(classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    guess, labels = (torch.randint(classes, (2, 6, 7), generator=generator) for _ in range(2))
    labels[0, :2] = 255
    return guess, labels


def test_mean_iou_written_out() -> None:
    guess, labels = maps()
    counts = label_counts(guess, labels, 4)
    real = labels != 255
    ious = []
    for c in range(3):
        both = ((guess == c) & (labels == c) & real).sum()
        either = (((guess == c) | (labels == c)) & real).sum()
        ious.append(float(both / either))
    assert mean_iou(counts) == pytest.approx(sum(ious) / 3)
    assert pixel_accuracy(counts) == pytest.approx(float((guess == labels)[real].double().mean()))
    assert int(counts.sum()) == int(real.sum())


def test_counts_of_batches_add_up() -> None:
    guess, labels = maps()
    parts = [label_counts(guess[i : i + 1], labels[i : i + 1], 3) for i in range(2)]
    assert torch.equal(sum(parts), label_counts(guess, labels, 3))


def test_the_truth_is_right_everywhere_and_another_class_nowhere() -> None:
    _, labels = maps()
    guess = labels.where(labels != 255, torch.zeros_like(labels))
    assert mean_iou(label_counts(guess, labels, 3)) == pixel_accuracy(label_counts(guess, labels, 3)) == 1
    assert border_accuracy(guess, labels, 2) == 1
    assert mean_iou(label_counts((guess + 1) % 3, labels, 3)) == 0


def test_a_band_has_as_many_pixels_on_either_side() -> None:
    labels = torch.zeros(1, 9, 12, dtype=torch.long)
    labels[..., 6:] = 1
    for width in (1, 2, 3):
        band = near_borders(labels, width)
        assert band[0, 4].nonzero().flatten().tolist() == list(range(6 - width, 6 + width))
        assert torch.equal(band, band[:, :1].expand_as(band))
    guess = torch.zeros_like(labels)
    guess[..., 7:] = 1
    assert border_accuracy(guess, labels, 1) == 0.5
    assert border_accuracy(guess, labels, 3) == pytest.approx(5 / 6)
    # a border to what is ignored is one, and what is ignored does not count
    labels[..., 6:] = 255
    assert border_accuracy(torch.zeros_like(labels), labels, 2) == 1


def test_rates_fall_to_zero_by_the_power_each_from_its_own() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimiser = torch.optim.SGD(head_rates(net, [net[1]], lr=1e-3), momentum=0.9)
    schedule = poly_schedule(optimiser, 20)
    seen = []
    for _ in range(22):
        seen.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        schedule.step()
    for t, (slow, fast) in enumerate(seen):
        assert slow == pytest.approx(1e-3 * max(0, 1 - t / 20) ** 0.9)
        assert fast == pytest.approx(10 * slow)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda g, y: label_counts(g[:1], y, 3), "guess, labels"),
        (lambda g, y: label_counts(g, y, 2), "0 to 1, got 0 to 2"),
        (lambda g, y: mean_iou(label_counts(g, torch.full_like(y, 255), 3)), "counts"),
        (lambda g, y: pixel_accuracy(label_counts(g, torch.full_like(y, 255), 3)), "counts"),
        (lambda g, y: border_accuracy(g, torch.zeros_like(y), 1), "no border"),
        (lambda g, y: border_accuracy(g, y, 0), "width"),
        (lambda g, y: head_rates(nn.Linear(2, 2), [nn.Linear(2, 2)], 0.1), "heads"),
        (lambda g, y: poly_schedule(torch.optim.SGD([torch.zeros(1)]), 0), "steps"),
    ],
)
def test_wrong_input_is_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call(*maps())


def test_f1_of_borders_counts_what_lies_near() -> None:
    labels = torch.zeros(1, 8, 12, dtype=torch.long)
    labels[..., 6:] = 1
    late = torch.zeros_like(labels)
    late[..., 8:] = 1
    assert border_f1(labels, labels, 0) == 1
    assert border_f1(late, labels, 0) == 0
    # pixels 7 and 8 of the guess against 5 and 6 of the truth
    assert border_f1(late, labels, 1) == 0.5
    assert border_f1(late, labels, 2) == 1
    assert border_f1(torch.zeros_like(labels), labels, 2) == 0
    labels[:, :, 9:] = 255
    assert border_f1(labels.where(labels != 255, torch.zeros_like(labels)), labels, 0) == 1
    with pytest.raises(InputError, match="neither holds a border"):
        border_f1(torch.zeros_like(labels), torch.zeros_like(labels))


def test_rates_can_rise_first() -> None:
    sgd = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = poly_schedule(sgd, steps=10, power=1.0, warm_up=4)
    rates = []
    for _ in range(10):
        rates += schedule.get_last_lr()
        sgd.step()
        schedule.step()
    assert rates == pytest.approx([min(1, (t + 1) / 4) * (1 - t / 10) for t in range(10)])
