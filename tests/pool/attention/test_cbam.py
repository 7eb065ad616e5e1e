import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import CbamPool
from cenote.testing import check_pool


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", [{}, {"hidden": 5, "kernel_size": 3, "bias": True}])
def test_equals_gates_on_a_map(training: bool, settings: dict) -> None:
    pool, x = shaken(CbamPool(32, tokens=16, **settings)).train(training), features(tokens=16, dim=32)
    bn = nn.BatchNorm2d(1).double().train(training)
    bn.load_state_dict(pool.bn.state_dict())
    image = x.transpose(1, 2).unflatten(-1, (4, 4))

    def mixed(pooled: torch.Tensor) -> torch.Tensor:
        return pool.fc2(F.relu(pool.fc1(pooled)))

    channel = torch.sigmoid(mixed(image.mean((2, 3))) + mixed(image.amax((2, 3))))[..., None, None]
    gated = image * channel
    maps = torch.cat([gated.mean(1, keepdim=True), gated.amax(1, keepdim=True)], 1)
    spatial = torch.sigmoid(bn(pool.conv(maps)))
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, F.relu(gated * spatial + image).mean((2, 3)))
    share = (1 + channel * spatial).mean(1) / 16
    torch.testing.assert_close(weights.squeeze(1), share.flatten(1))
    torch.testing.assert_close(pool.bn.running_var, bn.running_var)


def test_masked_patches_count_as_the_zeros_around_the_grid() -> None:
    """A masked last row and column of a 4 x 4 grid leave the 3 x 3 grid, whose surroundings are zeros too."""
    small, x = shaken(CbamPool(16, tokens=9)), features()
    large = CbamPool(16, tokens=16).double().eval()
    large.load_state_dict(small.state_dict())
    image = F.pad(x.transpose(1, 2).unflatten(-1, (3, 3)), (0, 1, 0, 1), value=9.0)
    mask = F.pad(torch.ones(2, 3, 3, dtype=torch.bool), (0, 1, 0, 1), value=False)
    torch.testing.assert_close(large(image, mask), small(x))


def test_hidden_width_of_the_channel_gate() -> None:
    assert [CbamPool(d, tokens=4).fc1.out_features for d in (4, 16, 40, 768)] == [1, 1, 3, 48]


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"hidden": 4, "bias": True}, {"kernel_size": 3}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(CbamPool(32, tokens=9, **settings), leave_out=left_out)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"tokens": 12}, "tokens"), ({"tokens": 0}, "tokens"), ({"tokens": 9, "kernel_size": 4}, "kernel_size")],
)
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        CbamPool(16, **settings)


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="9 tokens, got 4"):
        CbamPool(16, tokens=9).double()(features(tokens=4))
