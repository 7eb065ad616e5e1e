from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import (
    Fact,
    LogitParts,
    Parts,
    boost,
    constructive,
    edge_knockout,
    facts,
    head_classes,
    logit_parts,
    prompted,
    recall,
)
from cenote.testing.as_found import AsFound
from tests import tiny
from tests.models.live import zoo

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gpt2", "gpt_neox", "phi")
PADDED = {
    "input_ids": zoo.ids(3, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
}
END = PADDED["attention_mask"].sum(1) - 1
TARGETS = torch.tensor([[3, 4], [5, 6], [7, 8]])
EVERY = torch.arange(40).expand(3, -1)


def decoder(name: str) -> nn.Module:
    model = zoo.MODELS[name]("sdpa").model
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: nn.Module, targets: Tensor = TARGETS) -> Tensor:
    found = model(**PADDED).logits
    return found[torch.arange(3), END].gather(1, targets)


@pytest.mark.parametrize("name", DECODERS)
def test_parts_sum_to_logits_and_sources_to_heads(name: str) -> None:
    model = decoder(name)
    found = logit_parts(model, PADDED, TARGETS)
    assert found.parts.relative_residual < 1e-4
    torch.testing.assert_close(found.parts.values.sum(1), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.sources.sum(3), found.heads, rtol=1e-5, atol=1e-5)
    assert not found.sources[1, :, :, 4:].any()
    assert torch.equal(found.mask, PADDED["attention_mask"].bool())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_leaves_the_model_as_found_and_batch_mates_alone(name: str) -> None:
    model = decoder(name)
    found = AsFound(model, lambda: model(**PADDED))
    together = logit_parts(model, PADDED, TARGETS)
    assert not found.changed()
    alone = logit_parts(model, {n: v[1:2, :4] for n, v in PADDED.items()}, TARGETS[1:2])
    torch.testing.assert_close(together.sources[1:2, :, :, :4], alone.sources, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.parts.values[1:2], alone.parts.values, rtol=1e-4, atol=1e-4)


def test_centred_parts_sum_to_zero_over_the_vocabulary() -> None:
    model = decoder("gpt2")
    found = logit_parts(model, PADDED, EVERY, centred=True)
    assert found.parts.values.sum(2).abs().max() < 1e-3
    whole = logits(model, EVERY)
    torch.testing.assert_close(found.parts.total, whole - whole.mean(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_attention_to_one_token_leaves_that_source_alone() -> None:
    hidden = {**PADDED, "attention_mask": torch.tensor([[0] * 6 + [1]] * 3)}
    found = logit_parts(decoder("llama"), hidden, TARGETS)
    assert not found.sources[..., :6, :].any()
    assert bool((found.sources[..., 6, :] != 0).all())
    torch.testing.assert_close(found.sources[..., 6, :], found.heads, rtol=1e-5, atol=1e-5)


def test_a_head_without_its_slice_gives_nothing() -> None:
    model = decoder("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
    found = logit_parts(model, PADDED, TARGETS)
    assert not found.heads[:, 1, 1].any()
    assert not found.sources[:, 1, 1].any()
    assert found.heads[:, 1, [0, 2, 3]].any()


def test_permuting_heads_permutes_the_parts() -> None:
    model = decoder("gpt2")
    other, order = copy.deepcopy(model), [2, 0, 3, 1]
    at = torch.cat([torch.arange(8) + 8 * h for h in order])
    with torch.no_grad():
        attention, own = other.transformer.h[1].attn, model.transformer.h[1].attn
        wide = torch.cat([at, at + 32, at + 64])
        attention.c_attn.weight.copy_(own.c_attn.weight[:, wide])
        attention.c_attn.bias.copy_(own.c_attn.bias[wide])
        attention.c_proj.weight.copy_(own.c_proj.weight[at])
    a, b = (logit_parts(m, PADDED, TARGETS).sources[:, 1] for m in (model, other))
    torch.testing.assert_close(b, a[:, order], rtol=1e-4, atol=1e-5)


def test_groups_partition_the_tokens() -> None:
    found = logit_parts(decoder("llama"), PADDED, TARGETS)
    first = torch.zeros(3, 7, dtype=torch.bool)
    first[:, :2] = True
    third = torch.zeros_like(first)
    third[:, 2] = True
    groups = found.groups({"subject": first, "relation": third})
    assert list(groups) == ["subject", "relation", "other"]
    torch.testing.assert_close(sum(groups.values()), found.heads, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="'relation' shares a token with another group"):
        found.groups({"subject": first, "relation": first})


def test_a_soft_cap_stands_behind_the_sum() -> None:
    model = decoder("llama")
    plain = logits(model)

    def capped(_: nn.Module, __: object, output: object) -> object:
        output.logits = 0.5 * torch.tanh(output.logits / 0.5)  # type: ignore[attr-defined]
        return output

    model.register_forward_hook(capped)
    assert bool((logits(model).abs() <= 0.5).all())
    found = logit_parts(model, PADDED, TARGETS)
    torch.testing.assert_close(found.parts.values.sum(1), plain, rtol=1e-4, atol=1e-4)


def test_what_moved_a_logit_most_is_said() -> None:
    found = logit_parts(decoder("llama"), PADDED, TARGETS)
    (name, value), *_ = found.top_sources(3, item=1)
    layer, head, token = (int(x) for x in name.removeprefix("head ").replace(" from ", ".").split("."))
    assert value == pytest.approx(float(found.sources[1, layer, head, token, 0]))
    assert abs(value) == pytest.approx(float(found.sources[1, ..., 0].abs().max()))
    assert found.parts.only("mlp ").shape == (3, 2)
    torch.testing.assert_close(found.mlps.sum(1), found.parts.only("mlp "))


def test_parts_are_saved(tmp_path: Path) -> None:
    parts = logit_parts(decoder("llama"), PADDED, TARGETS).parts
    parts.save(tmp_path / "parts.safetensors")
    again = Parts.load(tmp_path / "parts.safetensors")
    assert torch.equal(again.values, parts.values)
    assert tuple(again.names) == tuple(parts.names)
    (tmp_path / "other").write_text("no")
    with pytest.raises(InputError, match="holds no parts"):
        Parts.load(tmp_path / "other")
    with pytest.raises(InputError, match="is not there"):
        Parts.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "BertModel has no map from states to logits"),
        ("bert_decoder", "nothing behind the blocks of BertLMHeadModel is a final norm"),
        ("gemma2", "do not stand before its parts alone"),
    ],
)
def test_other_models_are_refused(name: str, message: str) -> None:
    model = zoo.MODELS[name]("eager" if name in zoo.EAGER_ONLY else "sdpa").model
    with pytest.raises(InputError, match=message):
        logit_parts(model, PADDED, TARGETS)


def test_scaled_attention_is_refused() -> None:
    model = decoder("llama")
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda _, __, output: (2 * output[0], *output[1:]))
    with pytest.raises(InputError, match="does not add the outputs of its heads as they are"):
        logit_parts(model, PADDED, TARGETS)


def test_targets_are_checked() -> None:
    model = decoder("llama")
    with pytest.raises(InputError, match=r"targets: expected \[3, targets\]"):
        logit_parts(model, PADDED, TARGETS[:2])
    with pytest.raises(InputError, match="expected numbers below 40"):
        logit_parts(model, PADDED, TARGETS + 38)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_cut_edges_move_the_logits_and_leave_the_model_as_found(name: str) -> None:
    model = decoder(name)
    span = torch.zeros(3, 7, dtype=torch.bool)
    span[:, 1:3] = True
    found = AsFound(model, lambda: model(**PADDED))
    change = edge_knockout(model, PADDED, TARGETS, span, blocks=[2])
    assert not found.changed()
    assert change.shape == (3, 2)
    assert bool((change != 0).all())
    padding = torch.zeros_like(span).index_fill(1, torch.tensor([6]), True)
    assert not edge_knockout(model, PADDED, TARGETS, padding, blocks=[2])[1].any()


def test_a_cut_row_is_the_softmax_of_what_is_left() -> None:
    from cenote.explain import CutEdges
    from cenote.models.live import RowRecorder, edited

    model = decoder("llama")
    reader, hidden = torch.zeros(2, 3, 7, dtype=torch.bool).unbind()
    reader[torch.arange(3), END] = True
    hidden[:, 1:3] = True
    before, after = RowRecorder("reader"), RowRecorder("reader")
    with (
        torch.no_grad(),
        edited(model, before, CutEdges("reader", "hidden"), after, spans={"reader": reader, "hidden": hidden}),
    ):
        model(**PADDED)
    first = next(iter(before.found))
    kept = before.found[first][0].masked_fill(hidden[:, None, None], 0)
    torch.testing.assert_close(after.found[first][0], kept / kept.sum(-1, keepdim=True))


def test_heads_are_named_by_what_they_read() -> None:
    subject, relation = torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)
    subject[:, 0, 0], relation[:, 0, 1] = 5.0, -4.0
    subject[:, 0, 2], relation[:, 0, 2] = 1.0, 0.5
    found = head_classes(subject, relation)
    assert [(c.head, c.kind) for c in found] == [(0, "subject"), (1, "relation"), (2, "mixed")]
    assert [c.kind for c in head_classes(subject, relation, ratio=1.5)] == ["subject", "relation", "subject"]
    assert len(head_classes(subject, relation, top=1)) == 1


def test_recall_counts_ties_as_failures() -> None:
    values = torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    of_relation = torch.tensor([[True, True, False], [False, True, True]])
    of_subject = torch.tensor([[True, False, False], [True, True, False]])
    found = recall(values, torch.tensor([0, 1]), of_relation, of_subject)
    assert (found.top1, found.rank, found.over_relation, found.over_subject) == (0.5, 1.5, 1.0, 3.0)


def test_interference_is_constructive_where_only_the_answer_is_boosted() -> None:
    a, b = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, 0.0]]), torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, 0.0]])
    assert constructive({"a": a, "b": b}, torch.tensor([0, 0])) == 0.5
    with pytest.raises(InputError, match="at least two"):
        constructive({"a": a}, torch.tensor([0, 0]))


@pytest.fixture
def letters(tmp_path: Path) -> object:
    tiny.words(tmp_path)
    return tiny.transformers().AutoTokenizer.from_pretrained(tmp_path)


def test_prompts_know_subject_relation_and_rivals(letters: object) -> None:
    template = "a |b| {subject} c"
    chosen = [Fact("x y", "r", "k", template), Fact("z", "r", "l", template), Fact("z", "s", "m", template)]
    found = prompted(letters, chosen)
    assert found.inputs["input_ids"].shape == (3, 7)
    # [CLS] a b x y c [SEP]
    assert found.spans["subject"][0].int().tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert found.spans["relation"][1].int().tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert found.spans["end"].int().argmax(1).tolist() == [6, 5, 5]
    assert found.of_relation.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert found.of_subject.int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert found.answer.tolist() == [0, 1, 2]
    assert found.targets.shape == (3, 3)


def test_shipped_facts_are_of_four_relations() -> None:
    known = facts()
    assert {fact.relation for fact in known} == {"capital", "language", "continent", "currency"}
    assert len({(fact.subject, fact.relation) for fact in known}) == len(known) > 100


@pytest.mark.parametrize(
    ("template", "message"),
    [("a b c", "expected {subject} once"), ("a {subject} c", "between bars"), ("|a| {subject}", "no problem")],
)
def test_templates_are_checked(letters: object, template: str, message: str) -> None:
    if message == "no problem":
        assert prompted(letters, [Fact("x", "r", "k", template)]).spans["subject"].any()
        return
    with pytest.raises(InputError, match=message):
        prompted(letters, [Fact("x", "r", "k", template)])


def test_logit_parts_say_what_they_are() -> None:
    found = logit_parts(decoder("gpt2"), PADDED, TARGETS)
    assert isinstance(found, LogitParts)
    names = list(found.parts.names)
    assert names[:2] == ["embedding", "head 0.0"]
    assert names[-2:] == ["mlp 2", "constant"]
    assert "attention bias 1" in names


def test_feed_forward_parts_boost_a_relation_evenly_or_not() -> None:
    of_relation = torch.tensor([[True, True, False, False], [False, True, True, False]])
    even = torch.where(of_relation, 2.0, -1.0)
    uneven = torch.tensor([[4.0, 0.0, -1.0, -1.0], [-1.0, 4.0, 0.0, -1.0]])
    found = boost(torch.stack([even, uneven], 1), of_relation)
    assert found.lead.tolist() == [3.0, 3.0]
    assert found.spread.tolist() == pytest.approx([0.0, 2 / 3])
    with pytest.raises(InputError, match="inside of its relation and outside"):
        boost(even[:, None], torch.ones_like(of_relation))
