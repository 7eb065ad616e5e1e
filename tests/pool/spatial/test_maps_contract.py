"""Every window pool of the catalog keeps the contract, in the forms in which windows come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.pools import by_rules

import cenote
from cenote.pool import (
    AdaPool1d,
    AdaPool2d,
    AdaPool3d,
    EDSCWPool1d,
    EDSCWPool2d,
    EDSCWPool3d,
    GatedPool1d,
    GatedPool2d,
    GatedPool3d,
    IDWPool1d,
    IDWPool3d,
    MixedPool1d,
    MixedPool2d,
    MixedPool3d,
    SoftPool1d,
    SoftPool2d,
    SoftPool3d,
    TreePool1d,
    TreePool2d,
    TreePool3d,
    WindowPool,
)
from cenote.testing import check_spatial_pool

METHODS = [m.name for m in cenote.methods(room="pool", kind="maps")]
WINDOWS: dict[str, dict[str, Any]] = {
    "2x2": {"kernel_size": 2},
    "overlapping, padded, ceil": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    "oblong with gaps": {"kernel_size": (1, 2), "stride": (2, 3)},
}


@by_rules(check_spatial_pool)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", METHODS)
def test_pool_keeps_its_contract(name: str, window: str, left_out: tuple[str, ...]) -> None:
    check_spatial_pool(cenote.create(name, **WINDOWS[window]), leave_out=left_out)


ONE_AND_THREE = [AdaPool1d, AdaPool3d, EDSCWPool1d, EDSCWPool3d, GatedPool1d, GatedPool3d, IDWPool1d, IDWPool3d]
ONE_AND_THREE += [MixedPool1d, MixedPool3d, SoftPool1d, SoftPool3d, TreePool1d, TreePool3d]


@by_rules(check_spatial_pool)
@pytest.mark.parametrize("cls", ONE_AND_THREE)
def test_one_and_three_dimensions_keep_it(cls: type[WindowPool], left_out: tuple[str, ...]) -> None:
    check_spatial_pool(cls(2), leave_out=left_out)


OPTIONS: dict[str, tuple[WindowPool, tuple[int, int] | None]] = {
    "SoftPool shared": (SoftPool2d(3, 2, 1, weights="shared"), None),
    "SoftPool temperature": (SoftPool2d(2, temperature=0.5), None),
    "mixed that counts padding": (MixedPool2d(2, padding=1, count_include_pad=True), None),
    "eDSCW vector": (EDSCWPool2d(3, 2, 1, similarity="vector"), None),
    "AdaPool map of beta": (AdaPool2d(2, beta=torch.full((2, 2), 0.5)), (4, 5)),
    "AdaPool sigmoid": (AdaPool2d(2, constraint="sigmoid"), None),
    "AdaPool vector": (AdaPool2d(2, similarity="vector"), None),
    "mixed by channel and region": (MixedPool2d(2, channels=4, regions=(2, 3), constraint="clamp"), (4, 6)),
    "gated by region": (GatedPool2d(3, 2, regions=(2, 2)), (5, 6)),
    "gated by channel": (GatedPool2d(2, channels=2), None),
    "tree, three levels, by channel and region": (TreePool2d(2, levels=3, channels=3, regions=2), (4, 4)),
    "tree, one level": (TreePool2d(2, levels=1, leaves="mean"), None),
}


@by_rules(check_spatial_pool)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_keep_it(name: str, left_out: tuple[str, ...]) -> None:
    pool, size = OPTIONS[name]
    check_spatial_pool(pool, size=size, leave_out=left_out)
