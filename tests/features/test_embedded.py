import subprocess
import sys

import numpy as np
import pytest
import torch

from cenote.core import Bags
from cenote.features import digit_bags, digits, embedded
from cenote.features.digits_mae import DigitsEncoder, patches

FIRST_CLS = [0.0261, 1.0665, -1.1995, 0.3726]
LAST_PATCH = [-0.9481, 0.4148, -1.0578, 0.6227]


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    raw, data = load_digits(), digits()
    np.testing.assert_array_equal(embedded._read().images.numpy(), raw.images)
    np.testing.assert_array_equal(data.y.numpy(), raw.target)
    assert data.images is not None
    np.testing.assert_allclose(data.images, raw.images * 255 / 16, atol=0.5)


def test_digits_split_is_stratified_and_whole() -> None:
    data = digits()
    assert data.split.bincount().tolist() == [1000, 200, 597]
    shares = torch.stack([data.y[data.split == s].bincount(minlength=10) / (data.split == s).sum() for s in range(3)])
    assert (shares.amax(0) - shares.amin(0)).max() < 0.01


def test_digits_say_what_they_are() -> None:
    data = digits()
    assert isinstance(data.x, torch.Tensor)
    assert data.x.shape == (1797, 17, 64)
    assert data.grid == (4, 4)
    assert data.prefix_tokens == 1
    assert len(set(data.ids)) == 1797
    assert torch.isfinite(data.x).all()


def test_file_is_small() -> None:
    assert embedded.FILE.stat().st_size < 500_000


def test_backbone_output_is_reproducible() -> None:
    images = embedded._read().images[:3].float() / 16
    with torch.no_grad():
        again = embedded._read().encoder(images)
    torch.testing.assert_close(again, digits().x[:3], atol=1e-5, rtol=1e-5)


def test_backbone_output_matches_what_was_written_down() -> None:
    x = digits().x
    torch.testing.assert_close(x[0, 0, :4], torch.tensor(FIRST_CLS), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(x[-1, -1, :4], torch.tensor(LAST_PATCH), atol=1e-3, rtol=1e-3)


def test_patches_are_two_by_two_pixels_row_by_row() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8)
    assert patches(image)[0, 0].tolist() == [0, 1, 8, 9]
    assert patches(image)[0, 1].tolist() == [2, 3, 10, 11]
    assert patches(image)[0, 4].tolist() == [16, 17, 24, 25]


def test_encoder_sees_only_the_kept_patches() -> None:
    encoder = DigitsEncoder()
    keep = torch.tensor([[0, 5, 6]])
    image = torch.rand(1, 8, 8)
    changed = image.clone()
    changed[:, 6:] = 0  # the last row of patches, none of them kept
    torch.testing.assert_close(encoder(image, keep), encoder(changed, keep))
    assert encoder(image, keep).shape == (1, 4, 64)


def test_two_calls_share_no_memory() -> None:
    first = digits()
    assert isinstance(first.x, torch.Tensor)
    first.x.zero_()
    first.y.zero_()
    assert digits().fingerprint() != first.fingerprint()
    assert digits().x.abs().sum() > 0


def test_bags_answer_their_question() -> None:
    data = digit_bags()
    assert isinstance(data.x, Bags)
    assert data.token_labels is not None
    holds = torch.stack([part.any() for part in data.token_labels.bool().split(data.lengths().tolist())])
    assert torch.equal(holds.long(), data.y)


def test_bags_are_balanced_and_of_every_size() -> None:
    data = digit_bags()
    assert data.split.bincount().tolist() == [400, 100, 300]
    for split in range(3):
        assert data.y[data.split == split].float().mean() == 0.5
    lengths = data.lengths()
    assert (lengths.min(), lengths.max()) == (5, 40)
    means = [lengths[data.y == label].float().mean() for label in (0, 1)]
    # standard error of either mean: 10.4 / sqrt(400) = 0.52
    assert abs(means[0] - means[1]) < 3 * 0.52 * 2**0.5


def test_bags_share_no_image_across_splits() -> None:
    raw, data = embedded._read(), digit_bags()
    assert isinstance(data.x, Bags)
    vectors = digits().x[:, 1:].mean(1)
    image = torch.cdist(data.x.values, vectors).argmin(1)
    torch.testing.assert_close(vectors[image], data.x.values)
    of_bag = data.split.repeat_interleave(data.lengths())
    assert torch.equal(raw.split[image], of_bag)
    for part in image.split(data.lengths().tolist()):
        assert len(part.unique()) == len(part)


def test_embedded_data_are_the_same_in_another_process() -> None:
    program = (
        "import torch, cenote.features as f; torch.manual_seed(5); d, b = f.digits(), f.digit_bags(); "
        "print(round(float(d.x.double().sum()), 2), b.lengths().tolist() == %s, b.y.tolist() == %s)"
    )
    bags = digit_bags()
    done = subprocess.run(
        [sys.executable, "-c", program % (bags.lengths().tolist(), bags.y.tolist())],
        capture_output=True,
        text=True,
        check=True,
    )
    total, lengths, labels = done.stdout.split()
    assert float(total) == pytest.approx(float(digits().x.double().sum()), abs=0.1)
    assert (lengths, labels) == ("True", "True")
