from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.core import InputError
from cenote.reduce.select_and_pack.backbone import SIZES, SPT
from cenote.reduce.select_and_pack.block import SelectAndPackAttention, SPABlock
from cenote.reduce.select_and_pack.costs import dense_products, packed_products, packing_time, window_products
from cenote.reduce.select_and_pack.gate import (
    SelectionGate,
    labels_of_boxes,
    labels_of_masks,
    resampled,
    selection_loss,
)
from cenote.reduce.select_and_pack.packing import (
    PackInfo,
    fill_of,
    pack_plan,
    pack_tokens,
    packed_attention,
    shifted_order,
    unpack_tokens,
)
from cenote.reduce.select_and_pack.training import spt_loss, train_spt
from cenote.reduce.select_and_pack.windows import WindowBlock

DIM = 8


def keeps(*counts: int, tokens: int = 6) -> Tensor:
    """So many tokens of each image, anywhere."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.zeros(len(counts), tokens, dtype=torch.bool)
    for row, count in zip(keep, counts, strict=True):
        row[torch.randperm(tokens, generator=generator)[:count]] = True
    return keep


def layer(gate: SelectionGate | None = None, **settings: Any) -> SelectAndPackAttention:
    torch.manual_seed(0)
    made = SelectAndPackAttention(DIM, 2, gate=gate, **settings).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return made


class Chosen(SelectionGate):
    """Keeps what it is told to."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__(DIM)
        self.told = keep

    def drawn(self, score: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.told[..., None].to(score)


def by_image(made: SelectAndPackAttention, x: Tensor, keep: Tensor) -> Tensor:
    """Attention of each image among its kept tokens, one image after the other, with torch's own module."""
    whole = torch.nn.MultiheadAttention(DIM, made.heads, batch_first=True).double()
    whole.load_state_dict(
        {
            "in_proj_weight": made.qkv.weight,
            "in_proj_bias": made.qkv.bias,
            "out_proj.weight": made.output.weight,
            "out_proj.bias": made.output.bias,
        }
    )
    r = made.norm(x)
    gated = made.gate.scorer(r).sigmoid() * r
    out = x.clone()
    for n, row in enumerate(keep):
        if row.any():
            own = gated[n : n + 1, row]
            out[n, row] = out[n, row] + whole(own, own, own, need_weights=False)[0][0]
    return out


def test_the_stream_is_cut_into_full_containers_and_comes_back() -> None:
    x = torch.randn(4, 6, 3)
    for keep in (keeps(2, 5, 0, 4), keeps(6, 6, 6, 6), keeps(0, 0, 1, 0)):
        info = pack_plan(keep, length=4)
        total = int(keep.sum())
        assert len(info.image) == math.ceil(total / 4)
        assert info.real.flatten()[:total].all()
        assert not info.real.flatten()[total:].any()
        order = [(n, p) for n, row in enumerate(keep) for p in row.nonzero()[:, 0].tolist()]
        assert list(zip(info.image.flatten().tolist(), info.position.flatten().tolist(), strict=True))[:total] == order
        assert torch.equal(unpack_tokens(pack_tokens(x, info), info), torch.where(keep[..., None], x, 0.0))


@pytest.mark.parametrize("packing", ["stream", "first-fit", "padded"])
def test_packed_is_each_image_by_itself_where_none_is_cut(packing: str) -> None:
    keep = keeps(3, 1, 4, 2)
    made = layer(Chosen(keep), length=4, packing=packing)
    x = torch.randn(4, 6, DIM).double()
    found = made(x)
    assert packing != "stream" or (found.info.image[:, 0] != found.info.image[:, -1]).any()
    if packing == "stream":
        # 3 and 1 fill the first container, 4 the second
        assert found.info.image.tolist() == [[0, 0, 0, 1], [2, 2, 2, 2], [3, 3, -1, -1]]
    torch.testing.assert_close(found.y, by_image(made, x, keep))


def test_first_fit_is_each_image_by_itself_always() -> None:
    x = torch.randn(5, 6, DIM).double()
    for counts in ((3, 2, 3, 1, 2), (6, 1, 5, 0, 2), (1, 1, 1, 1, 1)):
        keep = keeps(*counts)
        made = layer(Chosen(keep), length=4, packing="first-fit")
        found = made(x)
        torch.testing.assert_close(found.y, by_image(made, x, keep))
        for n, count in enumerate(counts):
            assert (found.info.image == n).any(1).sum() == (count > 0)
    assert pack_plan(keeps(3, 2, 1, 2), 4, "first-fit").image.tolist() == [[0, 0, 0, 2], [1, 1, 3, 3]]


def test_an_image_that_is_cut_does_not_see_itself_across_the_cut() -> None:
    keep = keeps(3, 3)
    made = layer(Chosen(keep), length=4)
    x = torch.randn(2, 6, DIM).double()
    before = made(x)
    last = int(keep[1].nonzero()[-1])
    x[1, last] = torch.randn(DIM)
    changed = (made(x).y != before.y).any(-1)
    assert before.info.image.tolist() == [[0, 0, 0, 1], [1, 1, -1, -1]]
    first = int(keep[1].nonzero()[0])
    assert not changed[1, first]
    assert changed[1].sum() == 2


def test_keeping_all_with_one_image_per_container_is_plain_attention() -> None:
    keep = torch.ones(3, 6, dtype=torch.bool)
    x = torch.randn(3, 6, DIM).double()
    for settings in ({"length": 6}, {"packing": "padded"}, {"length": 9, "packing": "first-fit"}):
        made = layer(SelectionGate(DIM, choice="all"), **settings)
        torch.testing.assert_close(made(x).y, by_image(made, x, keep))


def test_padding_never_changes_an_output_and_gives_zeros_with_finite_gradients() -> None:
    info = pack_plan(keeps(3, 2), 4)
    q, k, v = (torch.randn(2, 2, 4, 3, requires_grad=True) for _ in range(3))
    found = packed_attention(q, k, v, info)
    assert not found.transpose(1, 2)[~info.real].any()
    grads = torch.autograd.grad(found.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert not any(g.transpose(1, 2)[~info.real].any() for g in grads)
    hidden = (~info.real)[:, None, :, None]
    other = [torch.where(hidden, 1e6, t) for t in (q, k, v)]
    torch.testing.assert_close(packed_attention(*other, info), found)
    nothing = PackInfo(torch.full((1, 4), -1), torch.full((1, 4), -1), (1, 4))
    empty = packed_attention(*(t[:1] for t in (q, k, v)), nothing)
    assert not empty.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(empty.sum(), (q, k, v)))


def test_nothing_kept_in_the_batch_gives_it_back() -> None:
    x = torch.randn(2, 6, DIM).double()
    for packing in ("stream", "first-fit", "padded"):
        found = layer(Chosen(keeps(0, 0)), packing=packing)(x)
        assert torch.equal(found.y, x)
        assert fill_of(found.info).kept.tolist() == [0, 0]
    block = SPABlock(DIM, 2, gate=Chosen(keeps(0, 0))).double()
    torch.testing.assert_close(block(x).y, x + block.network(x))


def test_an_image_with_nothing_kept_is_left_and_the_others_are_as_without_it() -> None:
    x = torch.randn(3, 6, DIM).double()
    keep = keeps(4, 0, 4)
    found = layer(Chosen(keep), length=4)(x).y
    assert torch.equal(found[1], x[1])
    others = torch.tensor([0, 2])
    torch.testing.assert_close(layer(Chosen(keep[others]), length=4)(x[others]).y, found[others])


def test_the_gate_learns_through_its_hard_choice_and_keeps_different_numbers() -> None:
    torch.manual_seed(0)
    attention = SelectAndPackAttention(DIM, 2)
    found = attention(torch.randn(6, 30, DIM))
    assert len(set(found.keep.sum(1).tolist())) > 1
    (grad,) = torch.autograd.grad(found.y.square().sum(), attention.gate.scorer.weight)
    assert grad.abs().sum() > 0
    # the choice's own part, where the gate's sigmoid has none
    score = torch.randn(2, 5, 1, requires_grad=True)
    drawn = SelectionGate(DIM).drawn(score)
    assert set(drawn.flatten().tolist()) <= {0.0, 1.0}
    assert torch.autograd.grad(drawn.sum(), score)[0].all()


def test_tokens_that_are_not_kept_get_no_gradient_through_the_attention() -> None:
    keep = keeps(3, 4)
    x = torch.randn(2, 6, DIM).double().requires_grad_()
    found = layer(Chosen(keep))(x).y - x
    assert not found[~keep].any()
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    assert not grad[~keep].any()
    assert grad[keep].all()


def test_the_draw_is_gumbel_softmax_of_two_logits() -> None:
    gate = SelectionGate(DIM, temperature=0.7)
    score, u = torch.randn(1, 2000, 1), torch.rand(1, 2000, 1, generator=torch.Generator().manual_seed(0))
    share = gate.drawn(score, u).mean()
    assert abs(float(share - score.sigmoid().mean())) < 0.03
    soft = ((F.logsigmoid(score) - F.logsigmoid(-score) + (u / (1 - u)).log()) / 0.7).sigmoid()
    assert torch.equal(gate.drawn(score, u), (soft > 0.5).float())


def test_scores_never_fall_below_those_handed_on_and_are_brought_to_the_grid() -> None:
    gate, x = SelectionGate(DIM, deep=True), torch.randn(1, 6, DIM)
    up = torch.randn(1, 6, 1)
    assert torch.equal(gate(x, up).score, torch.maximum(gate(x).score, up))
    maps = torch.arange(12.0).view(1, 12, 1)
    assert resampled(maps, (3, 4), (3, 2)).flatten().tolist() == [1, 3, 5, 7, 9, 11]
    assert resampled(maps, (3, 4), (2, 2)).flatten().tolist() == [5, 7, 9, 11]
    assert resampled(maps[:, :2], (1, 2), (2, 2)).flatten().tolist() == [0, 1, 0, 1]
    assert torch.equal(resampled(maps, (3, 4), (3, 4)), maps)


def test_in_eval_mode_nothing_is_drawn_and_images_may_change_places() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, DIM)
    for packing in ("first-fit", "padded"):
        block = SPABlock(DIM, 2, 6, packing, shift=1).eval()
        found = block(x, grid=(2, 3))
        assert torch.equal(found.y, block(x, grid=(2, 3)).y)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(block(x[order], grid=(2, 3)).y, found.y[order])
    scores = block.attention.gate(block.attention.norm(x)).score
    assert torch.equal(found.keep, scores[..., 0].sigmoid() > 0.5)
    block.attention.gate.threshold = 0.3
    assert block(x, grid=(2, 3)).keep.sum() > found.keep.sum()


def test_a_shifted_map_is_packed_in_another_order_and_everything_comes_back_to_its_place() -> None:
    order = shifted_order((3, 4), 1)
    assert order.view(3, 4)[0].tolist() == [5, 6, 7, 4]
    moved = torch.arange(12).view(3, 4).roll((-1, -1), (0, 1)).flatten()
    assert torch.equal(order, moved)
    x, keep = torch.randn(2, 12, DIM).double(), keeps(7, 6, tokens=12)
    info = pack_plan(keep, 4, order=order)
    assert torch.equal(unpack_tokens(pack_tokens(x, info), info), torch.where(keep[..., None], x, 0.0))
    assert info.position.tolist() != pack_plan(keep, 4).position.tolist()
    # where no image is cut, the order does not matter
    whole, shifted = (layer(Chosen(keep), length=12, packing="first-fit", shift=s) for s in (0, 1))
    torch.testing.assert_close(shifted(x, grid=(3, 4)).y, whole(x).y)
    cut, moved = (layer(Chosen(keep), length=4, shift=s)(x, grid=(3, 4)).y for s in (0, 1))
    assert not torch.allclose(cut, moved)


def test_padding_of_the_batch_is_never_kept() -> None:
    made = layer(SelectionGate(DIM, choice="all"), packing="padded")
    x, mask = torch.randn(2, 6, DIM).double(), torch.arange(6) < torch.tensor([[6], [4]])
    found = made(x, mask=mask)
    assert torch.equal(found.keep, mask)
    torch.testing.assert_close(found.y[1, :4], made(x[1:, :4]).y[0])


def test_uniform_choice_keeps_the_same_share_of_every_image() -> None:
    gate = SelectionGate(DIM, choice="top", share=0.5)
    x = torch.randn(3, 6, DIM)
    gated = gate(x)
    assert gated.keep.sum(1).tolist() == [3, 3, 3]
    assert all(gated.score[n, row].min() >= gated.score[n, ~row].max() for n, row in enumerate(gated.keep))


def test_labels_are_cells_that_overlap_an_object() -> None:
    none = torch.zeros(0, 4)
    boxes = [torch.tensor([[3.0, 0, 5, 2], [6, 6, 8, 8]]), none, torch.tensor([[0.0, 0, 4, 4], [4, 4, 4, 6]])]
    found = labels_of_boxes(boxes, (8, 8), (2, 2))
    assert found.int().tolist() == [[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :2, 3:5] = masks[0, 6:, 6:] = masks[2, :4, :4] = True
    assert torch.equal(labels_of_masks(masks, (2, 2)), found)
    assert labels_of_masks(masks, (4, 4)).sum(1).tolist() == [3, 0, 4]
    with pytest.raises(InputError, match="boxes: expected"):
        labels_of_boxes([torch.tensor([[3.0, 0, 1, 2]])], (8, 8), (2, 2))


def test_the_selection_loss_is_binary_cross_entropy_summed_over_blocks() -> None:
    scores, labels = [torch.randn(2, n, 1) for n in (4, 9)], [torch.rand(2, n) < 0.5 for n in (4, 9)]
    expected = sum(F.binary_cross_entropy(s[..., 0].sigmoid(), y.float()) for s, y in zip(scores, labels, strict=True))
    torch.testing.assert_close(selection_loss(scores, labels), expected)
    assert float(spt_loss(torch.tensor(1.0), None)) == 1.0
    with pytest.raises(InputError, match="labels: expected one map"):
        selection_loss(scores, labels[:1])


def test_windows_are_those_of_plain_attention_in_each_window() -> None:
    torch.manual_seed(0)
    block = WindowBlock(DIM, 2, side=2).double()
    torch.nn.init.normal_(block.bias)
    x = torch.randn(2, 16, DIM).double()
    whole = block(x, (4, 4)).view(2, 4, 4, DIM)
    one = x.view(2, 4, 4, DIM)[:, 2:, :2].flatten(1, 2)
    torch.testing.assert_close(block(one, (2, 2)).view(2, 2, 2, DIM), whole[:, 2:, :2])
    # a map that is no multiple of the side: what fills it up is not read
    odd = block(x[:, :9], (3, 3)).view(2, 3, 3, DIM)
    alone = x[:, :9].view(2, 3, 3, DIM)[:, 2:, 2:].flatten(1, 2)
    torch.testing.assert_close(block(alone, (1, 1))[:, 0], odd[:, 2, 2])


def test_shifted_windows_do_not_read_over_the_edge() -> None:
    torch.manual_seed(0)
    block = WindowBlock(DIM, 2, side=2, shift=1).double()
    x = torch.randn(1, 16, DIM).double()
    before = block(x, (4, 4))
    x[0, 0] = torch.randn(DIM)
    assert (block(x, (4, 4)) != before).any(-1).nonzero()[:, 1].tolist() == [0]
    x[0, 5] = torch.randn(DIM)
    assert (block(x, (4, 4)) != before).any(-1).nonzero()[:, 1].tolist() == [0, 5, 6, 9, 10]


@pytest.mark.parametrize(("start", "selecting"), [(1, 7), (2, 6), (3, 4), (4, 1)])
def test_stages_halve_the_map_and_select_from_the_chosen_one_on(start: int, selecting: int) -> None:
    torch.manual_seed(0)
    model = SPT(5, dim=4, depths=(1, 2, 3, 1), heads=(1, 1, 2, 2), start=start, side=2, patch=2)
    masks = torch.zeros(2, 24, 40, dtype=torch.bool)
    masks[0, 3:9, 5:20] = True
    seen = model(torch.randn(2, 3, 24, 40), masks)
    assert [tuple(m.shape) for m in seen.maps] == [(2, 4, 12, 20), (2, 8, 6, 10), (2, 16, 3, 5), (2, 32, 2, 3)]
    assert seen.logits.shape == (2, 5)
    assert len(seen.scores) == len(seen.keeps) == len(seen.infos) == selecting
    labels = [labels_of_masks(masks, grid) for grid in seen.grids]
    torch.testing.assert_close(seen.selection_loss, selection_loss(seen.scores, labels))
    for n in range(1, selecting):
        up = resampled(seen.scores[n - 1], seen.grids[n - 1], seen.grids[n])
        assert (seen.scores[n] >= up).all()
    assert model(torch.randn(2, 3, 24, 40)).selection_loss is None


def test_the_published_sizes_are_swins_with_four_blocks_more() -> None:
    with torch.device("meta"):
        for size in SIZES:
            model = SPT.of(size, 10)  # type: ignore[arg-type]
            assert [len(s) for s in model.stages] == [2, 2, {"tiny": 6, "small": 18, "base": 18}[size] + 4, 2]
            kinds = [type(stage[0]) for stage in model.stages]
            assert kinds == [WindowBlock, WindowBlock, SPABlock, SPABlock]
            assert model.stages[2][1].attention.shift == 3
            assert model.stages[2][1].attention.length == 49


@pytest.mark.parametrize("labelled", [True, False])
def test_it_trains_end_to_end_with_and_without_maps_of_objects(labelled: bool) -> None:
    torch.manual_seed(0)
    masks = torch.zeros(16, 8, 8, dtype=torch.bool)
    labels = torch.arange(16)[:, None] % 2 == torch.arange(2)
    masks[labels[:, 0], :4, :4] = masks[labels[:, 1], 4:, 4:] = True
    images = masks[:, None] + 0.1 * torch.randn(16, 1, 8, 8)
    model = SPT(2, dim=8, depths=(1, 1), heads=(1, 1), start=2, side=2, patch=2, channels=1)
    trained = train_spt(model, images, labels, masks if labelled else None, epochs=12, batch=8, lr=1e-2)
    assert trained.losses[-1] < trained.losses[0]
    assert (trained.selection_losses[-1] < trained.selection_losses[0]) == labelled
    assert not model.training
    seen = model(images)
    if labelled:
        assert (seen.keeps[0] == labels_of_masks(masks, seen.grids[0])).double().mean() > 0.8


def test_counts_are_the_published_ones_and_the_fill_is_counted() -> None:
    assert dense_products(2, 10, 3) == 2 * (4 * 10 * 9 + 2 * 100 * 3)
    assert window_products(2, 10, 3, 2) == 2 * (4 * 10 * 9 + 2 * 4 * 10 * 3)
    assert packed_products(2, 10, 3, 4, 5) == 2 * (10 * 3 + 10 * 9) + 4 * (3 * 5 * 9 + 2 * 25 * 3)
    fill = fill_of(pack_plan(keeps(3, 6, 0), 4))
    assert fill.kept.tolist() == [0.5, 1.0, 0.0]
    assert fill.kept_overall == 0.5
    assert fill.slots == 12 / 18
    assert fill.padding == 3 / 12


def test_packing_holds_fewer_slots_than_padding_to_the_longest() -> None:
    made = layer(Chosen(keeps(6, 1, 1, 2)), length=4)
    x = torch.randn(4, 6, DIM).double()
    packed, padded = (packing_time(made, x, kind, repeats=1) for kind in ("stream", "padded"))  # type: ignore[arg-type]
    assert packed.fill.slots == 12 / 24
    assert padded.fill.slots == 1.0
    assert packed.seconds > 0
    assert made.packing == "stream"


def test_what_does_not_fit_is_said() -> None:
    x = torch.randn(2, 6, DIM).double()
    for message, call in (
        ("heads: 3 does not divide", lambda: SelectAndPackAttention(DIM, 3)),
        ("grid: expected rows and columns of the 6", lambda: layer(shift=1)(x)),
        ("label: expected \\[2, 6\\]", lambda: layer()(x, label=torch.ones(2, 5, dtype=torch.bool))),
        ("score_up: expected \\[2, 6, 1\\]", lambda: layer()(x, torch.zeros(2, 4, 1).double())),
        ("threshold: expected a share", lambda: SelectionGate(DIM, threshold=2.0)),
        ("packing: expected 'stream'", lambda: pack_plan(keeps(1, 1), packing="no")),  # type: ignore[arg-type]
        ("length: expected at least 1", lambda: pack_plan(keeps(1, 1), 0)),
        ("order: expected 6", lambda: pack_plan(keeps(1, 1), order=torch.arange(5))),
        ("grid: 2 x 2 are not the 6", lambda: resampled(torch.zeros(1, 6, 1), (2, 2), (1, 1))),
        ("grid: 2 x 2 are not the 6", lambda: WindowBlock(DIM, 2, 2)(x.float(), (2, 2))),
        ("shift: expected from 0", lambda: WindowBlock(DIM, 2, 2, shift=2)),
        ("depths: expected as many", lambda: SPT(2, depths=(1,), heads=(1, 1))),
        ("images: expected sides", lambda: SPT(2, 4, (1,), (1,))(torch.zeros(1, 3, 5, 8))),
        ("masks: expected", lambda: SPT(2, 4, (1,), (1,))(torch.zeros(1, 3, 8, 8), torch.ones(1, 4, 4) > 0)),
        ("size: expected 'tiny'", lambda: SPT.of("huge", 2)),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message):
            call()
