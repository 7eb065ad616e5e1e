"""Every window pool of the catalog keeps the contract, in the forms in which windows come."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", METHODS)
def test_pool_keeps_its_contract(name: str, window: str) -> None:
    check_spatial_pool(cenote.create(name, **WINDOWS[window]))


ONE_AND_THREE = [AdaPool1d, AdaPool3d, EDSCWPool1d, EDSCWPool3d, GatedPool1d, GatedPool3d, IDWPool1d, IDWPool3d]
ONE_AND_THREE += [MixedPool1d, MixedPool3d, SoftPool1d, SoftPool3d, TreePool1d, TreePool3d]


@pytest.mark.parametrize("cls", ONE_AND_THREE)
def test_one_and_three_dimensions_keep_it(cls: type[WindowPool]) -> None:
    check_spatial_pool(cls(2))


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


@pytest.mark.parametrize("name", OPTIONS)
def test_options_keep_it(name: str) -> None:
    pool, size = OPTIONS[name]
    check_spatial_pool(pool, size=size)


PROGRAM = """
import sys
from jaxtyping import install_import_hook
install_import_hook("cenote", "beartype.beartype")
import torch, cenote
from cenote.pool import AdaUnpool2d, GlobalAveragePool, GramianHeads, NetworkInNetwork, TokenFlex
from cenote.pool import DecorrelationLoss, class_maps
for name in sys.argv[1:]:
    pool = cenote.create(name, kernel_size=3, stride=2, padding=1)
    x = torch.randn(2, 3, 8, 7, requires_grad=True)
    pool(x).sum().backward(), pool(x[0])
    if hasattr(pool, "attend"):
        y, weights = pool.attend(x)
        AdaUnpool2d(3, 2, 1)(y, weights, (8, 7))
for layer in (True, False):
    heads = GramianHeads(16, 4, branches=2, gram_layer=layer)
    DecorrelationLoss()(heads.logits(torch.randn(2, 16, 4, 4), torch.rand(2, 4, 4) > 0.3), torch.tensor([0, 3])).backward()
    heads(torch.randn(2, 16, 4, 4))
NetworkInNetwork(3, 5, ((4, 4), (4,)), (3, 3)).evidence(torch.randn(2, 3, 9, 9))
GlobalAveragePool()(torch.randn(2, 5, 4, 4), torch.rand(2, 4, 4) > 0.3)
class_maps(torch.randn(2, 5, 4, 4), torch.nn.Linear(5, 3))
TokenFlex(8, 6, num_tokens=4, norm=True)(torch.randn(2, 16, 8)), TokenFlex(8, 6, num_tokens=(1, 2))(torch.randn(2, 8, 3, 4))
from cenote.pool import AFADLAUp, DeepLab, DeepLabV3, DenseCRF, effective_receptive_field, receptive_extent, to_output_stride
trunk = to_output_stride(torch.nn.Conv2d(3, 16, 3, 4, 1), 1, torch.randn(1, 3, 16, 16))
images = torch.randint(256, (2, 3, 17, 14), dtype=torch.uint8)
for method in ("exact", "lattice"):
    net = DeepLab(torch.nn.Conv2d(3, 4, 3, 4, 1), 4, 3, (1, 2), None, 4, (0.5, 1.0), DenseCRF(method=method, iterations=1))
    net.eval().segment(images / 255, images)
DenseCRF(iterations=1).refine(torch.rand(2, 17, 14), images)
net = DeepLabV3(torch.nn.Conv2d(3, 4, 3, 4, 1), 4, 3, 4, (1, 2), 4)
net(images / 255), net.head.aspp.attend(torch.randn(2, 4, 5, 4), torch.rand(2, 5, 4) > 0.3)
receptive_extent(effective_receptive_field(net, images / 255))
neck = AFADLAUp((16, 16, 24))
pyramid = [torch.randn(2, 16, 8, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 24, 2, 2)]
neck(pyramid), neck.last.attend(neck.by_node(pyramid)), neck.nodes[0].fuse[0].attend(pyramid[0], pyramid[0])
print("shapes hold")
"""


def test_shapes_hold() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *METHODS], capture_output=True, text=True, check=False)
    assert done.stdout == "shapes hold\n", done.stderr[-2000:]
