import pytest
import torch

import cenote


@pytest.mark.parametrize("name", ["abmil", "simpool", "attentive-statistics"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_another_type_than_the_pool_are_told(name: str, dtype: torch.dtype) -> None:
    pool = cenote.create(name, dim=16)
    with pytest.raises(
        cenote.InputError, match=rf"x: expected torch.float32 as the parameters of .*, got {dtype}; use x"
    ):
        pool(torch.zeros(2, 9, 16, dtype=dtype))
    with pytest.raises(cenote.InputError, match="use x"):
        pool.attend(cenote.Bags.from_list([torch.zeros(3, 16, dtype=dtype)]))


@pytest.mark.parametrize("name", ["mean", "max", "gem"])
def test_pools_without_matrices_take_any_type(name: str) -> None:
    assert cenote.create(name, dim=16)(torch.zeros(2, 9, 16, dtype=torch.float64)).dtype == torch.float64


def test_layers_of_another_type_are_told() -> None:
    name = next(
        m.name for m in cenote.methods(room="pool", kind="layers") if next(iter(_built(m.name).parameters())).dim() > 1
    )
    with pytest.raises(cenote.InputError, match=r"x: expected torch.float32"):
        _built(name)(torch.zeros(2, 3, 9, 16, dtype=torch.float64))


def _built(name: str) -> torch.nn.Module:
    pool: torch.nn.Module = cenote.create(name, dim=16, layers=3)
    return pool


def test_autocast_sees_to_it() -> None:
    pool = cenote.create("abmil", dim=16)
    with torch.autocast("cpu", torch.bfloat16):
        assert pool(torch.zeros(2, 9, 16, dtype=torch.bfloat16)).shape == (2, 16)


def test_a_whole_number_is_asked_for_where_one_counts() -> None:
    with pytest.raises(cenote.InputError, match=r"dim: expected a whole number for simpool, got 64.0"):
        cenote.create("simpool", dim=64.0)
    with pytest.raises(cenote.InputError, match=r"dim: expected a whole number for simpool, got True"):
        cenote.create("simpool", True)
