from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.pools import features, shaken
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import (
    FlatMemories,
    HierarchicalMemories,
    ImageMemory,
    Imagination,
    Memories,
    ParallelMemories,
    SerialMemories,
    imagination_loss,
)

DIM, HEADS = 8, 2
LAYERS = [SerialMemories, ParallelMemories, FlatMemories, HierarchicalMemories]
TEXT_MASK = torch.arange(5).expand(2, 5) < torch.tensor([[3], [5]])


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return features(2, 3, DIM), features(2, 5, DIM, seed=2), features(2, 7, DIM, seed=3)


def torch_attention(ours: nn.Module, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
    theirs = nn.MultiheadAttention(DIM, ours.heads, bias=False, batch_first=True).double().eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        theirs.out_proj.weight.copy_(ours.to_out.weight)
    return theirs(query, memory, memory, key_padding_mask=None if mask is None else ~mask)[0]


def test_serial_equation() -> None:
    layer, (q, text, image) = shaken(SerialMemories(DIM, heads=HEADS)), inputs()
    c = q + torch_attention(layer.attentions[0], layer.norms[0](q), text, TEXT_MASK)
    c = c + torch_attention(layer.attentions[1], layer.norms[1](c), image)
    torch.testing.assert_close(layer(q, [text, image], [TEXT_MASK, None]), c)


def test_parallel_equation() -> None:
    layer, (q, text, image) = shaken(ParallelMemories(DIM, heads=HEADS)), inputs()
    n = layer.norm(q)
    expected = (
        q + torch_attention(layer.attentions[0], n, text, TEXT_MASK) + torch_attention(layer.attentions[1], n, image)
    )
    torch.testing.assert_close(layer(q, [text, image], [TEXT_MASK, None]), expected)


def test_flat_equation() -> None:
    layer, (q, text, image) = shaken(FlatMemories(DIM, heads=HEADS)), inputs()
    mask = torch.cat([TEXT_MASK, torch.ones(2, 7, dtype=torch.bool)], 1)
    expected = q + torch_attention(layer.joint_attention, layer.norm(q), torch.cat([text, image], 1), mask)
    torch.testing.assert_close(layer(q, [text, image], [TEXT_MASK, None]), expected)


def test_hierarchical_equation() -> None:
    layer, (q, text, image) = shaken(HierarchicalMemories(DIM, heads=HEADS)), inputs()
    n = layer.norm(q)
    found = [
        torch_attention(layer.attentions[0], n, text, TEXT_MASK),
        torch_attention(layer.attentions[1], n, image),
    ]
    chosen = [
        torch_attention(layer.choice, n[:, i : i + 1], torch.stack([f[:, i] for f in found], 1)) for i in range(3)
    ]
    torch.testing.assert_close(layer(q, [text, image], [TEXT_MASK, None]), q + torch.cat(chosen, 1))


def test_one_memory_makes_the_first_three_rules_equal() -> None:
    q, text, _ = inputs()
    serial = shaken(SerialMemories(DIM, memories=1, heads=HEADS))
    parallel, flat = ParallelMemories(DIM, 1, HEADS).double(), FlatMemories(DIM, 1, HEADS).double()
    for layer, inner in ((parallel, parallel.attentions[0]), (flat, flat.joint_attention)):
        layer.norm.load_state_dict(serial.norms[0].state_dict())
        inner.load_state_dict(serial.attentions[0].state_dict())
        torch.testing.assert_close(layer(q, [text], [TEXT_MASK]), serial(q, [text], [TEXT_MASK]))


def test_hierarchical_with_one_memory_and_one_head_is_parallel() -> None:
    q, text, _ = inputs()
    hierarchical = shaken(HierarchicalMemories(DIM, 1, heads=HEADS, hierarchical_heads=1))
    assert not list(hierarchical.choice.parameters())
    parallel = ParallelMemories(DIM, 1, HEADS).double()
    parallel.load_state_dict(hierarchical.state_dict())
    torch.testing.assert_close(hierarchical(q, [text]), parallel(q, [text]))


def test_flat_with_a_memory_twice_is_flat_with_it_once() -> None:
    q, text, _ = inputs()
    twice = shaken(FlatMemories(DIM, 2, HEADS))
    once = FlatMemories(DIM, 1, HEADS).double()
    once.load_state_dict(twice.state_dict())
    torch.testing.assert_close(twice(q, [text, text], [TEXT_MASK, TEXT_MASK]), once(q, [text], [TEXT_MASK]))


@pytest.mark.parametrize("layer", LAYERS)
def test_without_output_maps_the_queries_come_back(layer: type[Memories]) -> None:
    module, (q, text, image) = shaken(layer(DIM, heads=HEADS)), inputs()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "to_out" in name:
                p.zero_()
    torch.testing.assert_close(module(q, [text, image]), q)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_memory_without_real_slots_is_left_out(layer: type[Memories], bias: bool) -> None:
    module, (q, text, image) = shaken(layer(DIM, heads=HEADS, bias=bias)), inputs()
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    got, weights, _ = module.attend(q, [text, image.fill_(float("nan"))], [TEXT_MASK, nothing])
    single = layer(DIM, memories=1, heads=HEADS, bias=bias).double().eval()
    single.load_state_dict({k: v for k, v in module.state_dict().items() if k in single.state_dict()})
    torch.testing.assert_close(got, single(q, [text], [TEXT_MASK]))
    assert weights[1].eq(0).all()
    torch.testing.assert_close(module(q, [text, image[:, :0]], [TEXT_MASK, None]), got)


@pytest.mark.parametrize("layer", LAYERS)
def test_padding_and_batch_mates_do_nothing(layer: type[Memories]) -> None:
    module, (q, text, image) = shaken(layer(DIM, heads=HEADS)), inputs()
    whole = module(q, [text, image], [TEXT_MASK, None])
    alone = module(q[:1], [text[:1, :3], image[:1]])
    torch.testing.assert_close(whole[:1], alone)
    loud = text.masked_fill(~TEXT_MASK.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(module(q, [loud, image], [TEXT_MASK, None]), whole)


@pytest.mark.parametrize("layer", LAYERS)
def test_weights_sum_to_one(layer: type[Memories]) -> None:
    module, (q, text, image) = shaken(layer(DIM, heads=HEADS)), inputs()
    output, weights, shares = module.attend(q, [text, image], [TEXT_MASK, None])
    torch.testing.assert_close(output, module(q, [text, image], [TEXT_MASK, None]))
    assert [w.shape for w in weights] == [(2, HEADS, 3, 5), (2, HEADS, 3, 7)]
    ones = torch.ones(2, HEADS, 3, dtype=torch.float64)
    if layer is FlatMemories:
        torch.testing.assert_close(weights[0].sum(-1) + weights[1].sum(-1), ones)
    else:
        torch.testing.assert_close(weights[0].sum(-1), ones)
        torch.testing.assert_close(weights[1].sum(-1), ones)
    assert weights[0][0, :, :, 3:].eq(0).all()
    if layer is HierarchicalMemories:
        torch.testing.assert_close(shares.sum(-1), ones)
    else:
        assert shares is None


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_compile_export_and_storage(layer: type[Memories]) -> None:
    module, (q, text, image) = shaken(layer(DIM, heads=HEADS)), inputs()
    names = [n for n, _ in module.named_parameters()]
    masks = [TEXT_MASK, None]

    def run(q: Tensor, text: Tensor, image: Tensor) -> Tensor:
        return module(q, [text, image], masks)

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in (q, text, image)), fast_mode=True)
    run(q, text, image).backward(features(2, 3, DIM, seed=9))
    assert [n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12] == []
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, [text, image], masks), run(q, text, image))
    exported = torch.export.export(module, (q.detach(), [text.detach(), image.detach()], masks))
    torch.testing.assert_close(exported.module()(q, [text, image], masks), run(q, text, image))
    assert set(module.state_dict()) == set(names)


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_works_in_training_only(layer: type[Memories]) -> None:
    module, (q, text, image) = shaken(layer(DIM, heads=HEADS, dropout=0.5)), inputs()
    assert torch.equal(module(q, [text, image]), module(q, [text, image]))
    module.train()
    assert not torch.equal(module(q, [text, image]), module(q, [text, image]))


def test_heads_may_differ_by_memory() -> None:
    module, (q, text, image) = shaken(ParallelMemories(DIM, heads=[4, 1])), inputs()
    _, weights, _ = module.attend(q, [text, image])
    assert [w.shape[1] for w in weights] == [4, 1]
    assert not list(module.attentions[1].parameters())


def test_wrong_input_is_named() -> None:
    q, text, image = inputs()
    layer = SerialMemories(DIM, heads=HEADS).double()
    for given, named in (
        ((q[0], [text, image]), "queries"),
        ((q, [text]), "memories"),
        ((q, text), "memories"),
        ((q, [text, image[..., :4]]), "ImageMemory"),
        ((q, [text, image], [TEXT_MASK]), "masks"),
        ((q, [text, image], [TEXT_MASK.double(), None]), "masks"),
        ((q, [text, image], [None, TEXT_MASK]), "masks"),
    ):
        with pytest.raises(InputError, match=named):
            layer(*given)
    for settings, named in (({"heads": 3}, "heads"), ({"heads": [2]}, "heads"), ({"memories": 0}, "memories")):
        with pytest.raises(InputError, match=named):
            SerialMemories(DIM, **settings)
    with pytest.raises(InputError, match="heads"):
        FlatMemories(DIM, heads=[2, 4])


def test_image_memory_goes_row_by_row() -> None:
    module = shaken(ImageMemory(6, DIM, hidden=5))
    image = features(2, 6, 12).unflatten(-1, (3, 4))
    memory = module(image)
    expected = module.fc2(F.relu(module.fc1(image[:, :, 1, 2])))
    torch.testing.assert_close(memory[:, 6], expected)
    for wrong in (image[:, :5], image[0, :, :, :3]):
        with pytest.raises(InputError, match="image"):
            module(wrong)


def test_image_memory_takes_the_patches_of_a_transformer() -> None:
    module, image = shaken(ImageMemory(6, DIM)), features(2, 6, 12).unflatten(-1, (3, 4))
    assert torch.equal(module(image.flatten(2).transpose(1, 2)), module(image))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_imagination_pools_real_states_only(activation: str) -> None:
    head = shaken(Imagination(DIM, 6, hidden=5, activation=activation))
    _, text, _ = inputs()
    act = torch.tanh if activation == "tanh" else F.relu
    expected = head.fc2(act(head.fc1(text[0, :3].mean(0))))
    torch.testing.assert_close(head(text, TEXT_MASK)[0], expected)
    assert head.out_dim == 6


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_imagination_loss_written_out(reduction: str) -> None:
    p, v = features(1, 4, 6)[0], features(1, 4, 6, seed=8)[0]
    total = 0.0
    for b in range(4):
        hinges = [
            max(0.0, 0.1 - float(F.cosine_similarity(p[b], v[b], 0)) + float(F.cosine_similarity(p[b], v[c], 0)))
            for c in range(4)
            if c != b
        ]
        total += sum(hinges) / (3 if reduction == "mean" else 1)
    assert imagination_loss(p, v, reduction=reduction).item() == pytest.approx(total / 4)


def test_imagination_loss_at_its_edges() -> None:
    v = features(1, 4, 6)[0]
    assert imagination_loss(v[:1], -v[:1]).item() == 0
    # all images alike: every other one is as near as its own
    assert imagination_loss(v, v[:1].expand(4, -1)).item() == pytest.approx(3 * 0.1)
    p = v.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: imagination_loss(p, v.flip(0), margin=1.0), (p,))
    with pytest.raises(InputError, match="image"):
        imagination_loss(v, v[:2])
    with pytest.raises(InputError, match="reduction"):
        imagination_loss(v, v, reduction="max")


@pytest.mark.parametrize("layer", LAYERS)
def test_kept_memories_are_read_as_they_are(layer: type[Memories]) -> None:
    module, (q, text, image) = shaken(layer(DIM, heads=HEADS, bias=True)), inputs()
    nothing = torch.tensor([[True] * 7, [False] * 7])
    masks = [TEXT_MASK, nothing]
    kept = module.keep([text.masked_fill(~TEXT_MASK.unsqueeze(-1), float("nan")), image], masks)
    for found, expected in zip(module.attend(q, kept), module.attend(q, [text, image], masks), strict=True):
        torch.testing.assert_close(found, expected)
    twice = module.attend(q.repeat_interleave(2, 0), kept.repeated(2)).output
    torch.testing.assert_close(twice[::2], module(q, [text, image], masks))
