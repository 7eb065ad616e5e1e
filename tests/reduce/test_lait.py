from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import stack_blocks
from cenote.reduce.lait.cache import SegmentCache
from cenote.reduce.lait.costs import attention_pairs, linear_products, relative_pairs
from cenote.reduce.lait.encoder import LAITEncoder, front
from cenote.reduce.lait.heads import LAITClassifier, LAITSeq2Seq
from cenote.reduce.lait.training import fine_tune_lait, largest_split, sweep_splits
from tests import tiny

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
ROTARY = {**SIZES, "global_attn_every_n_layers": 2, "local_attention": 8, **ENDS}
FAMILIES: dict[str, dict[str, Any]] = {"BertModel": SIZES, "RobertaModel": SIZES, "T5EncoderModel": T5}


def model(family: str = "BertModel", **settings: Any) -> nn.Module:
    library = tiny.transformers()
    cls = getattr(library, family)
    torch.manual_seed(0)
    made = cls(cls.config_class(**{**FAMILIES.get(family, {}), **settings})).eval()
    for p in made.parameters():
        # weights so large that a mask or a position that is wrong shows
        torch.nn.init.normal_(p, 0, 0.2)
    return made


class Counting(nn.Module):
    """An encoder that counts positions itself, and that no library made."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(40, 8), nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]) % 9)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=attention_mask == 0)
        return x


def seq2seq() -> nn.Module:
    return model("T5ForConditionalGeneration", **T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)


def segments() -> tuple[Tensor, Tensor]:
    """Three items of three segments, some of them padded, one empty."""
    ids = torch.randint(3, 40, (3, 3, 5), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[5, 2, 4], [3, 5, 1], [4, 0, 2]])
    return ids, torch.arange(5) < lengths[..., None]


def flat(ids: Tensor, mask: Tensor, item: int) -> Tensor:
    """The real tokens of an item, the segments one behind the other."""
    return ids[item][mask[item]][None]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_a_split_it_is_the_encoder_on_the_concatenation(family: str) -> None:
    encoder, (ids, mask) = model(family), segments()
    lait = LAITEncoder(encoder, 0, positions="global")
    found = lait(ids, mask)
    assert torch.equal(found.mask, mask.flatten(1))
    for item in range(3):
        whole = encoder(flat(ids, mask, item)).last_hidden_state[0]
        torch.testing.assert_close(found.states[item][found.mask[item]], whole, rtol=1e-4, atol=1e-5)
    assert not found.states[~found.mask].any()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_all_blocks_split_it_encodes_segments_alone(family: str) -> None:
    encoder, (ids, mask) = model(family), segments()
    found = LAITEncoder(encoder, 3)(ids, mask)
    for item in range(3):
        alone = [
            encoder(t[m][None]).last_hidden_state[0] for t, m in zip(ids[item], mask[item], strict=True) if m.any()
        ]
        torch.testing.assert_close(found.states[item][found.mask[item]], torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", range(4))
@torch.no_grad()
def test_a_split_is_the_encoder_under_a_mask_of_blocks_written_by_hand(split: int) -> None:
    """Block by block of `BertModel`, with a 4-D mask."""
    encoder, (ids, mask) = model(), segments()
    found = LAITEncoder(encoder, split)(ids, mask)
    for item in range(3):
        number = torch.arange(3)[:, None].expand_as(mask[item])[mask[item]]
        position = torch.arange(5).expand_as(mask[item])[mask[item]]
        h = encoder.embeddings(input_ids=flat(ids, mask, item), position_ids=position[None])
        apart = torch.zeros(len(number), len(number)).masked_fill(number[:, None] != number, -torch.inf)
        for block, layer in enumerate(encoder.encoder.layer):
            h = layer(h, apart[None, None] if block < split else None)
            h = h if isinstance(h, Tensor) else h[0]
        torch.testing.assert_close(found.states[item][found.mask[item]], h[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["per_segment", "global"])
@torch.no_grad()
def test_folding_and_a_mask_of_blocks_are_the_same(family: str, positions: Any) -> None:
    ids, mask = segments()
    for split in range(4):
        lait = LAITEncoder(model(family), split, positions)
        torch.testing.assert_close(lait(ids, mask, form="masked").states, lait(ids, mask).states, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rotary_positions_need_no_telling() -> None:
    encoder, (ids, mask) = model("ModernBertModel", **ROTARY), segments()
    whole = LAITEncoder(encoder, 0)(ids, mask)
    for item in range(3):
        own = encoder(flat(ids, mask, item)).last_hidden_state[0]
        torch.testing.assert_close(whole.states[item][whole.mask[item]], own, rtol=1e-4, atol=1e-5)
    lait = LAITEncoder(encoder, 2)
    torch.testing.assert_close(lait(ids, mask, form="masked").states, lait(ids, mask).states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_where_padding_stands_changes_nothing(family: str) -> None:
    ids, mask = segments()
    ids, mask = ids[:1], mask[:1]
    lait = LAITEncoder(model(family), 1)
    expected = lait(ids, mask)
    expected = expected.states[expected.mask]
    wide, wide_mask = torch.full((1, 3, 9), 7), torch.zeros(1, 3, 9, dtype=torch.bool)
    for n, places in enumerate(([0, 2, 3, 5, 8], [4, 7], [5, 6, 7, 8])):
        wide[0, n, places], wide_mask[0, n, places] = ids[0, n][mask[0, n]], True
    with_padding = lait(wide, wide_mask)
    torch.testing.assert_close(with_padding.states[with_padding.mask], expected, rtol=1e-4, atol=1e-5)
    # no padding at all: segments of one length
    even = torch.ones(1, 3, 5, dtype=torch.bool)
    full, fuller = lait(ids, even), nn.functional.pad(ids, (2, 1))
    padded = lait(fuller, nn.functional.pad(even, (2, 1)))
    torch.testing.assert_close(padded.states[padded.mask], full.states[full.mask], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_segment_never_changes_what_the_first_part_gives_of_another() -> None:
    ids, mask = segments()
    lait = LAITEncoder(model(), 2)
    before = lait.encode_segments(ids, mask)
    other = ids.clone()
    other[:, 1] = (other[:, 1] + 1) % 37 + 3
    after = lait.encode_segments(other, mask)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[:2, 1], before[:2, 1])
    assert not torch.allclose(lait(other, mask).states[:2, :2], lait(ids, mask).states[:2, :2])


@torch.no_grad()
def test_one_segment_is_the_encoder_for_every_split() -> None:
    ids, mask = segments()
    for family in FAMILIES:
        encoder = model(family)
        whole = encoder(ids[:1, 0]).last_hidden_state
        for split in range(4):
            for positions in ("per_segment", "global"):
                found = LAITEncoder(encoder, split, positions)(ids[:1, :1], mask[:1, :1])  # type: ignore[arg-type]
                torch.testing.assert_close(found.states, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_segment_is_as_if_it_were_absent() -> None:
    ids, mask = segments()
    for split in range(4):
        lait = LAITEncoder(model(), split)
        found = lait(ids[2:], mask[2:])
        assert found.states.isfinite().all()
        without = lait(ids[2:, [0, 2]], mask[2:, [0, 2]])
        torch.testing.assert_close(found.states[found.mask], without.states[without.mask], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_another_order_of_segments_is_another_order_of_the_first_part_and_of_the_joint_one_only_with_its_places() -> (
    None
):
    ids, mask = segments()
    order = torch.tensor([2, 0, 1])
    for family, follows in (("BertModel", True), ("T5EncoderModel", False)):
        # of BERT no block knows a position: these are in the states, and start anew in each segment
        lait = LAITEncoder(model(family), 1)
        first = lait.encode_segments(ids, mask)
        torch.testing.assert_close(lait.encode_segments(ids[:, order], mask[:, order]), first[:, order])
        joint = lait.encode_joint(first, mask).states.unflatten(1, (3, 5))
        moved = lait.encode_joint(first[:, order], mask[:, order]).states.unflatten(1, (3, 5))
        assert torch.allclose(moved, joint[:, order], rtol=1e-4, atol=1e-5) == follows


def test_an_encoder_of_ones_own_is_split_too() -> None:
    ids, mask = segments()
    own = Counting().eval()
    found = LAITEncoder(own, 1)(ids, mask)
    one = LAITEncoder(own, 1)(ids[:, :1], mask[:, :1])
    torch.testing.assert_close(one.states[0], own(ids[:1, 0], mask[:1, 0].long())[0])
    assert not torch.allclose(found.states[:, :5], one.states)


@torch.no_grad()
def test_any_mask_of_segments_in_any_block() -> None:
    ids, mask = segments()
    lait = LAITEncoder(model(), 1)
    eye, ones = torch.eye(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    split = lait.scheduled(ids, mask, [eye, ones, ones])
    torch.testing.assert_close(split.states, lait(ids, mask).states, rtol=1e-4, atol=1e-5)
    # the second segment reads the first, and not the other way round
    backwards = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    before = lait.scheduled(ids, mask, [backwards] * 3)
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 1) % 37 + 3
    after = lait.scheduled(other, mask, [backwards] * 3)
    torch.testing.assert_close(after.states[:, :10], before.states[:, :10], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after.states[:, 10:], before.states[:, 10:])
    with pytest.raises(InputError, match="schedule: expected a mask for each of 3 blocks, got 1"):
        lait.scheduled(ids, mask, [eye])


@torch.no_grad()
def test_other_inputs_of_a_token_go_with_it() -> None:
    encoder, (ids, mask) = model(), segments()
    types = torch.arange(3)[:, None].expand(3, 3, 5).clamp(max=1)
    found = LAITEncoder(encoder, 0, "global")(ids, mask, {"token_type_ids": types})
    for item in range(3):
        own = encoder(flat(ids, mask, item), token_type_ids=flat(types, mask, item)).last_hidden_state[0]
        torch.testing.assert_close(found.states[item][found.mask[item]], own, rtol=1e-4, atol=1e-5)


@contextmanager
def counted(encoder: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Of each block that runs its number and how many rows it read."""
    ran: list[tuple[int, int]] = []
    handles = [
        place.module.intermediate.register_forward_pre_hook(lambda _, x, n=place.block: ran.append((n, len(x[0]))))
        for place in stack_blocks(encoder)
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("positions", ["per_segment", "global"])
@torch.no_grad()
def test_what_is_kept_equals_what_is_computed_and_each_segment_runs_once(positions: Any) -> None:
    encoder = model()
    lait, cache = LAITEncoder(encoder, 2, positions).eval(), SegmentCache()
    claims = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(1))
    passages = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(2))
    ids = torch.stack([torch.stack([c, p]) for c in claims for p in passages])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 1, 3:] = False
    plain = lait(ids, mask).states
    lait(ids, mask, cache=cache)
    with counted(encoder) as ran:
        kept = lait(ids, mask, cache=cache)
        assert [n for n, _ in ran] == [2]
    torch.testing.assert_close(kept.states, plain, rtol=1e-5, atol=1e-6)
    # C + D segments, though there are C times D pairs
    assert (len(cache), cache.misses, cache.hits) == (7, 7, 24 + 17)
    fresh = SegmentCache()
    with counted(encoder) as ran:
        lait.encode_segments(ids, mask, cache=fresh)
    assert ran == [(0, 7), (1, 7)]


@torch.no_grad()
def test_what_was_kept_of_another_place_split_or_model_is_not_taken() -> None:
    ids, mask = segments()
    cache = SegmentCache()
    for split, positions in ((1, "per_segment"), (2, "per_segment"), (1, "global")):
        lait = LAITEncoder(model(), split, positions).eval()  # type: ignore[arg-type]
        torch.testing.assert_close(lait(ids, mask, cache=cache).states, lait(ids, mask).states, rtol=1e-5, atol=1e-6)
    known = len(cache)
    next(iter(lait.model.parameters())).mul_(1.5)
    torch.testing.assert_close(lait(ids, mask, cache=cache).states, lait(ids, mask).states, rtol=1e-5, atol=1e-6)
    assert len(cache) > known
    with pytest.raises(InputError, match="cache: keeps what is the same each time"):
        lait.train().encode_segments(ids, mask, cache=cache)
    with pytest.raises(InputError, match="cache: keeps segments that were encoded alone"):
        lait.eval()(ids, mask, form="masked", cache=cache)


@torch.no_grad()
def test_a_cache_has_a_limit_and_is_written_and_read(tmp_path: Path) -> None:
    ids, mask = segments()
    lait = LAITEncoder(model(), 2).eval()
    cache = SegmentCache(dtype=torch.float16)
    half = lait(ids, mask, cache=cache).states
    torch.testing.assert_close(lait(ids, mask, cache=cache).states, lait(ids, mask).states, rtol=1e-2, atol=1e-2)
    assert cache.nbytes == int(mask.sum()) * 16 * 2
    cache.save(tmp_path / "kept.safetensors")
    again = SegmentCache(dtype=torch.float16).load(tmp_path / "kept.safetensors")
    with counted(lait.model) as ran:
        torch.testing.assert_close(lait(ids, mask, cache=again).states, half, rtol=1e-2, atol=1e-2)
        assert [n for n, _ in ran] == [2]
    small = SegmentCache(limit=6 * 16 * 4)
    lait(ids, mask, cache=small)
    assert 0 < small.nbytes <= small.limit
    assert len(SegmentCache(limit=0)) == 0
    (tmp_path / "other").write_text("no")
    with pytest.raises(InputError, match="does not hold segments"):
        cache.load(tmp_path / "other")
    with pytest.raises(InputError, match="is not there"):
        cache.load(tmp_path / "nowhere")


@torch.no_grad()
def test_the_decoder_reads_all_segments_and_without_a_split_it_is_t5() -> None:
    t5, (ids, mask) = seq2seq(), segments()
    labels = torch.randint(3, 40, (3, 4))
    found = LAITSeq2Seq(t5, 0)(ids, mask, labels=labels)
    for item in range(3):
        whole = t5(input_ids=flat(ids, mask, item), labels=labels[item : item + 1])
        torch.testing.assert_close(found.logits[item], whole.logits[0], rtol=1e-4, atol=1e-4)
    lait = LAITSeq2Seq(t5, 3)
    assert sum(p.numel() for p in lait.parameters()) == sum(p.numel() for p in t5.parameters())
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 1) % 37 + 3
    assert not torch.allclose(lait(other, mask, labels=labels).logits, lait(ids, mask, labels=labels).logits)


@torch.no_grad()
def test_label_texts_are_written_and_scored() -> None:
    t5, (ids, mask) = seq2seq(), segments()
    lait = LAITSeq2Seq(t5, 2).eval()
    cache = SegmentCache()
    written = lait.write(ids, mask, most=5)
    assert torch.equal(lait.write(ids, mask, most=5, decoder_cache=False), written)
    assert torch.equal(lait.write(ids, mask, most=5, cache=cache), written)
    before = written[:, :-1]
    logits = lait(ids, mask, decoder_input_ids=before).logits
    # until an item has ended
    going = (before[:, 1:] != 1).long().cumprod(1).bool()
    assert torch.equal(logits.argmax(-1)[:, 0], written[:, 1])
    assert torch.equal(logits.argmax(-1)[:, 1:][going], written[:, 2:][going])
    labels = torch.tensor([[5, 1, -100], [6, 7, 1]])
    scores = lait.score(ids, mask, labels)
    for n, label in enumerate(([5, 1], [6, 7, 1])):
        own = torch.tensor(label).repeat(3, 1)
        log = lait(ids, mask, labels=own).logits.log_softmax(-1)
        torch.testing.assert_close(scores[:, n], log.gather(-1, own[..., None])[..., 0].sum(1))


def test_fine_tuning_goes_on_from_the_model_with_its_loss_alone() -> None:
    ids = torch.randint(3, 6, (24, 2, 3), generator=torch.Generator().manual_seed(0))
    target = (ids[:, 0, 0] == 3).long()
    mask = torch.ones_like(ids, dtype=torch.bool)
    for split in (0, 2):
        torch.manual_seed(0)
        classifier = LAITClassifier(
            LAITEncoder(model(num_hidden_layers=2), split), 16, 2, pool="first" if split else "mean"
        )
        losses = fine_tune_lait(classifier, ids, mask, target, steps=40, batch=24, lr=3e-3)
        assert losses[-1] < losses[0] - 0.1
        assert not classifier.training
    labels = target[:, None] + 5
    t5 = LAITSeq2Seq(seq2seq(), 1)
    losses = fine_tune_lait(t5, ids, mask, labels, steps=6, batch=24, lr=1e-2)
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_the_head_reads_the_mean_of_real_tokens_or_the_first_one() -> None:
    ids, mask = segments()
    mask[1, 0] = False
    encoder = LAITEncoder(model(), 1)
    joint = encoder(ids, mask)
    for pool in ("mean", "first"):
        head = LAITClassifier(encoder, 16, 2, pool)  # type: ignore[arg-type]
        for item, row in enumerate(head(ids, mask)):
            own = joint.states[item][joint.mask[item]]
            torch.testing.assert_close(row, head.output(own.mean(0) if pool == "mean" else own[0]))


def test_the_largest_split_within_a_tolerance_is_chosen() -> None:
    values = {0: 0.90, 2: 0.91, 4: 0.895, 6: 0.6}
    found = sweep_splits(values.__getitem__, values, tolerance=0.02)
    assert found.values == values
    assert found.chosen == 4
    assert largest_split(values, 0.0) == 2
    assert largest_split(values, 1.0) == 6
    with pytest.raises(InputError, match="values: expected what was measured"):
        largest_split({}, 0.1)


def test_pairs_are_the_entries_of_the_masks() -> None:
    lengths, layers = [4, 1, 3], 5
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    for split in range(layers + 1):
        apart, together = int((number[:, None] == number).sum()), len(number) ** 2
        pairs = split * apart + (layers - split) * together
        assert attention_pairs(lengths, layers, split) == pairs
        share = sum(n**2 for n in lengths) / sum(lengths) ** 2
        assert relative_pairs(lengths, layers, split) == pytest.approx(1 - split / layers * (1 - share))
    assert relative_pairs([7, 7], 10, 8) == pytest.approx(0.6)
    # maps of tokens cost the same for every split, and nothing of what is kept
    assert len({linear_products(lengths, layers, split, 8, 32) for split in range(6)}) == 1
    whole = linear_products(lengths, layers, 0, 8, 32)
    assert linear_products(lengths, layers, 5, 8, 32, [True] * 3) == 0
    assert linear_products(lengths, layers, 3, 8, 32, [True, False, False]) == whole * (5 * 8 - 3 * 4) // (5 * 8)
    for message, call in (
        ("lengths: expected", lambda: attention_pairs([], 2, 1)),
        ("split: expected from 0 to 2", lambda: attention_pairs([3], 2, 3)),
        ("cached: expected one for each of 1", lambda: linear_products([3], 2, 1, 4, 8, [True, False])),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_what_does_not_fit_is_said() -> None:
    ids, mask = segments()
    encoder = model()
    none = torch.zeros_like(mask)
    own = Counting()
    for message, call in (
        ("split: expected from 0 to the 3 blocks of the model, got 4", lambda: LAITEncoder(encoder, 4)),
        ("positions: expected 'per_segment'", lambda: LAITEncoder(encoder, 1, "no")),  # type: ignore[arg-type]
        ("positions: Counting counts its own", lambda: LAITEncoder(own, 1, "global")),
        ("form: Counting counts positions", lambda: LAITEncoder(own, 1)(ids, mask, form="masked")),
        ("mask: expected \\[3, 3, 5\\]", lambda: LAITEncoder(encoder, 1)(ids, mask[:2])),
        ("mask: expected a real token in each item; items \\[0, 1, 2\\]", lambda: LAITEncoder(encoder, 1)(ids, none)),
        ("input_ids: expected \\[batch, segments", lambda: LAITEncoder(encoder, 1)(ids[0], mask)),
        ("model: expected an encoder-decoder", lambda: LAITSeq2Seq(encoder, 1)),
        ("stack: expected the path", lambda: LAITEncoder(nn.Linear(2, 2), 0)),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_real_tokens_come_in_front_in_their_order() -> None:
    order, real = front(torch.tensor([[False, True, False, True], [False, False, False, False]]))
    assert order[0].tolist() == [1, 3]
    assert real.tolist() == [[True, True], [False, False]]
