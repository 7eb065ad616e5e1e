import pytest
import torch
from tests.maps import randn
from torch import Tensor

from cenote.core import InputError
from cenote.pool import guided_filter

H, W = 9, 11


def photograph() -> Tensor:
    return torch.randint(256, (2, 3, H, W), generator=torch.Generator().manual_seed(1))


def written_out(p: Tensor, i: Tensor, r: int, eps: float) -> Tensor:
    """Of one map and one grey image: a line is fitted in every window, and the lines at a pixel are averaged."""
    total, count = torch.zeros_like(p), torch.zeros_like(p)
    for y in range(H):
        for x in range(W):
            window = slice(max(0, y - r), y + r + 1), slice(max(0, x - r), x + r + 1)
            a = ((i[window] * p[window]).mean() - i[window].mean() * p[window].mean()) / (
                i[window].var(correction=0) + eps
            )
            total[window] += a * i[window] + p[window].mean() - a * i[window].mean()
            count[window] += 1
    return total / count


@pytest.mark.parametrize("radius", [1, 3])
def test_lines_are_fitted_in_windows_and_averaged(radius: int) -> None:
    p, image = randn(2, 2, H, W), photograph()
    got = guided_filter(p, image, radius, 50.0)
    for b in range(2):
        for c in range(2):
            torch.testing.assert_close(got[b, c], written_out(p[b, c], image[b].double().mean(0), radius, 50.0))


def test_a_constant_map_and_a_map_that_is_the_image_stay() -> None:
    image = photograph()
    torch.testing.assert_close(guided_filter(torch.full((2, 1, H, W), 0.25), image), torch.full((2, 1, H, W), 0.25))
    grey = image.double().mean(1, keepdim=True)
    torch.testing.assert_close(guided_filter(grey, image, 2, 1e-9), grey, atol=1e-6, rtol=1e-6)


def test_noise_goes_where_the_image_is_flat_and_an_edge_stays() -> None:
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 200.0
    truth = (image[:, :1] > 0).double()
    noisy = truth + 0.5 * randn(1, 1, 24, 24)
    smooth = guided_filter(noisy, image, 4)
    assert float((smooth - truth).square().mean()) < 0.1 * float((noisy - truth).square().mean())
    assert float(smooth[..., 12].mean() - smooth[..., 11].mean()) > 0.8


def test_probabilities_still_sum_to_one() -> None:
    p = randn(2, 4, H, W).softmax(1)
    torch.testing.assert_close(guided_filter(p, photograph()).sum(1), torch.ones(2, H, W, dtype=torch.float64))


def test_wrong_input_is_named() -> None:
    p = torch.rand(2, 1, H, W)
    for call, named in (
        (lambda: guided_filter(p, photograph()[..., 1:]), "image"),
        (lambda: guided_filter(p, photograph(), 0), "radius"),
        (lambda: guided_filter(p, photograph(), eps=0.0), "eps"),
    ):
        with pytest.raises(InputError, match=named):
            call()
