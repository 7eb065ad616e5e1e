"""Every window pool, and the nets that pool maps."""

import torch

import cenote
from cenote.pool import (
    AdaUnpool2d,
    AFADLAUp,
    DecorrelationLoss,
    DeepLab,
    DeepLabV3,
    DenseCRF,
    GlobalAveragePool,
    GramianHeads,
    NetworkInNetwork,
    TokenFlex,
    class_maps,
    effective_receptive_field,
    receptive_extent,
    to_output_stride,
)

for name in [m.name for m in cenote.methods(room="pool", kind="maps")]:
    pool = cenote.create(name, kernel_size=3, stride=2, padding=1)
    x = torch.randn(2, 3, 8, 7, requires_grad=True)
    pool(x).sum().backward(), pool(x[0])
    if hasattr(pool, "attend"):
        y, weights = pool.attend(x)
        AdaUnpool2d(3, 2, 1)(y, weights, (8, 7))
for layer in (True, False):
    heads = GramianHeads(16, 4, branches=2, gram_layer=layer)
    DecorrelationLoss()(
        heads.logits(torch.randn(2, 16, 4, 4), torch.rand(2, 4, 4) > 0.3), torch.tensor([0, 3])
    ).backward()
    heads(torch.randn(2, 16, 4, 4))
NetworkInNetwork(3, 5, ((4, 4), (4,)), (3, 3)).evidence(torch.randn(2, 3, 9, 9))
GlobalAveragePool()(torch.randn(2, 5, 4, 4), torch.rand(2, 4, 4) > 0.3)
class_maps(torch.randn(2, 5, 4, 4), torch.nn.Linear(5, 3))
(
    TokenFlex(8, 6, num_tokens=4, norm=True)(torch.randn(2, 16, 8)),
    TokenFlex(8, 6, num_tokens=(1, 2))(torch.randn(2, 8, 3, 4)),
)
trunk = to_output_stride(torch.nn.Conv2d(3, 16, 3, 4, 1), 1, torch.randn(1, 3, 16, 16))
images = torch.randint(256, (2, 3, 17, 14), dtype=torch.uint8)
for method in ("exact", "lattice"):
    net = DeepLab(
        torch.nn.Conv2d(3, 4, 3, 4, 1), 4, 3, (1, 2), None, 4, (0.5, 1.0), DenseCRF(method=method, iterations=1)
    )
    net.eval().segment(images / 255, images)
DenseCRF(iterations=1).refine(torch.rand(2, 17, 14), images)
net = DeepLabV3(torch.nn.Conv2d(3, 4, 3, 4, 1), 4, 3, 4, (1, 2), 4)
net(images / 255), net.head.aspp.attend(torch.randn(2, 4, 5, 4), torch.rand(2, 5, 4) > 0.3)
receptive_extent(effective_receptive_field(net, images / 255))
neck = AFADLAUp((16, 16, 24))
pyramid = [torch.randn(2, 16, 8, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 24, 2, 2)]
neck(pyramid), neck.last.attend(neck.by_node(pyramid)), neck.nodes[0].fuse[0].attend(pyramid[0], pyramid[0])
