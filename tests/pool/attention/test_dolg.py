import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import DolgPool
from cenote.testing import check_pool


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("leaky_relu", F.leaky_relu)])
def test_equals_convolutions_on_a_map(training: bool, activation: str, function) -> None:
    pool, x = shaken(DolgPool(16, hidden=12, activation=activation)).train(training), features()
    bn = nn.BatchNorm2d(12).double().train(training)
    bn.load_state_dict(pool.bn.state_dict())
    image = x.transpose(1, 2).unflatten(-1, (3, 3))
    z = bn(F.conv2d(image, pool.conv1.weight[..., None, None]))
    scores = F.softplus(F.conv2d(function(z), pool.conv2.weight[..., None, None], pool.conv2.bias))
    expected = (scores * z / z.norm(dim=1, keepdim=True)).mean((2, 3))
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, scores.flatten(2) / 9)
    torch.testing.assert_close(pool.bn.running_mean, bn.running_mean)
    torch.testing.assert_close(pool.bn.running_var, bn.running_var)


def test_weights_are_positive_and_need_not_sum_to_one() -> None:
    _, weights = shaken(DolgPool(16)).attend(features())
    assert (weights > 0).all()
    assert ((weights.sum(-1) - 1).abs() > 1e-3).all()


def test_output_is_no_longer_than_the_sum_of_the_weights() -> None:
    output, weights = shaken(DolgPool(16)).attend(features())
    assert (output.norm(dim=-1) <= weights.sum((1, 2))).all()


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"hidden": 10}, {"activation": "leaky_relu", "eps": 1e-3}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(DolgPool(16, **settings), leave_out=left_out)


def test_wrong_activation_is_named() -> None:
    with pytest.raises(InputError, match="activation"):
        DolgPool(16, activation="gelu")
