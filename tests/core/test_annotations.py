"""The annotations of cenote are checked in every test, shapes included; `tests/checked.py` says how."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError, config

from cenote.core import masks, moved, triton_kernels
from cenote.core.errors import InputError
from cenote.core.sets import PaddedTokens, as_tokens
from tests import checked

pytestmark = pytest.mark.skipif(config.jaxtyping_disable, reason="JAXTYPING_DISABLE is set")


def test_a_wrong_dtype_and_a_wrong_rank_are_found() -> None:
    with pytest.raises(TypeCheckError, match="first_tokens"):
        masks.first_tokens(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(TypeCheckError, match="PaddedTokens"):
        PaddedTokens(torch.zeros(3, 4))


def test_sizes_of_one_name_must_agree() -> None:
    with pytest.raises(TypeCheckError, match="real_tokens"):
        masks.real_tokens(torch.zeros(2, 3, 4), torch.ones(3, 3, dtype=torch.bool))


def test_plain_types_are_checked() -> None:
    with pytest.raises(TypeCheckError, match="address"):
        moved.address("cenote.pool", 3)  # type: ignore[arg-type]


def test_our_own_error_comes_first() -> None:
    with pytest.raises(InputError, match="floating point"):
        as_tokens(torch.zeros(2, 3, 4, dtype=torch.long))


def test_what_is_traced_has_no_checks() -> None:
    def first(x: torch.Tensor) -> torch.Tensor:
        return masks.first_tokens(x > 0)

    traced = torch.compile(first, fullgraph=True, backend="eager")
    assert traced(torch.ones(1, 2)).tolist() == [[True, False]]


def test_kernels_are_left_alone() -> None:
    assert not hasattr(triton_kernels.forward.fn, "__wrapped__")
    assert triton_kernels.__name__ == checked.KERNELS
