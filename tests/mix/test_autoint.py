from __future__ import annotations

import numpy as np
import pytest
import torch

from cenote.core import InputError
from cenote.mix.autoint.interacting import InteractingLayer
from cenote.mix.autoint.model import AutoInt, FieldEmbeddings
from cenote.mix.autoint.rivals import RIVALS, CompressedInteraction, CrossNetwork, FactorisationMachine, pairs_pooled
from cenote.mix.autoint.table import TableEncoder, log_square
from cenote.mix.autoint.training import (
    Rows,
    interaction_maps,
    logits_of,
    measure,
    over_seeds,
    partner_mass,
    train_autoint,
)

DOUBLE = torch.float64


def embedded(fields: int = 5, dim: int = 4) -> torch.Tensor:
    return torch.randn(3, fields, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def test_one_field_reads_itself() -> None:
    layer = InteractingLayer(4, 6).double()
    assert torch.equal(layer.attend(embedded(1)).weights, torch.ones(3, 2, 1, 1, dtype=DOUBLE))


def test_a_constant_vector_gives_the_norms_bias() -> None:
    layer = InteractingLayer(4, 6).double()
    with torch.no_grad():
        for parameter in (*layer.value.parameters(), *layer.residual.parameters()):  # type: ignore[union-attr]
            parameter.fill_(-1.0)
        layer.norm.bias.copy_(torch.arange(6.0))  # type: ignore[union-attr,operator]
    y = layer(embedded().abs())
    assert torch.equal(y, torch.arange(6.0, dtype=DOUBLE).expand_as(y))


def test_without_a_query_attention_is_even() -> None:
    layer = InteractingLayer(4, 6, residual=False).double()
    for parameter in layer.query.parameters():
        torch.nn.init.zeros_(parameter)
    x = embedded()
    y, weights = layer.attend(x)
    assert torch.allclose(weights, torch.full_like(weights, 0.2))
    mean = layer.value(x).relu().mean(1, keepdim=True).expand(-1, 5, -1)
    assert torch.allclose(y, layer.norm(mean))


def test_fields_permuted_with_the_output_weights_leave_the_logit() -> None:
    model = AutoInt(9, 5, dim=4, blocks=(6, 6)).double()
    order = torch.tensor([3, 0, 4, 2, 1])
    e = embedded()
    before = model.of_embeddings(e).logit
    with torch.no_grad():
        model.output.weight.copy_(model.output.weight.view(1, 5, 6)[:, order].flatten(1))
    assert torch.allclose(model.of_embeddings(e[:, order]).logit, before, atol=1e-12)


def test_a_value_scales_its_embedding_and_zero_gives_zeros() -> None:
    embed = FieldEmbeddings(4, 3)
    index = torch.tensor([[2, 2, 2]])
    one, scaled, none = embed(index, torch.tensor([[1.0, 2.5, 0.0]]))[0]
    assert torch.allclose(scaled, 2.5 * one)
    assert torch.equal(none, torch.zeros(3))


def test_several_values_are_averaged_and_none_gives_zeros() -> None:
    embed = FieldEmbeddings(4, 3)
    index = torch.tensor([[[1, 3], [0, 0]]])
    present = torch.tensor([[[True, True], [False, False]]])
    both, none = embed(index, torch.ones(1, 2, 2), present)[0]
    assert torch.allclose(both, (embed.table.weight[1] + embed.table.weight[3]) / 2)
    assert torch.equal(none, torch.zeros(3))


def test_a_field_whose_only_value_is_absent_gives_zeros() -> None:
    embed, index = FieldEmbeddings(4, 3), torch.tensor([[2, 1]])
    there, absent = embed(index, torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))[0]
    assert torch.equal(there, embed.table.weight[2])
    assert torch.equal(absent, torch.zeros(3))
    with pytest.raises(InputError, match=r"present: expected bool \[1, 2\]"):
        embed(index, torch.ones(1, 2), torch.ones(1, 2))


def test_features_that_there_are_not_are_refused() -> None:
    with pytest.raises(InputError, match="index: expected 0 to 3, got 1 to 4"):
        FieldEmbeddings(4, 3)(torch.tensor([[1, 4]]), torch.ones(1, 2))
    with pytest.raises(InputError, match="value: expected the shape of index"):
        FieldEmbeddings(4, 3)(torch.tensor([[1, 4]]), torch.ones(1, 3))
    with pytest.raises(InputError, match="heads: expected to share 6 units"):
        InteractingLayer(4, 6, heads=4)


def test_the_paper_form_is_linear_before_its_relu_and_has_no_norm() -> None:
    layer = InteractingLayer(4, 6, paper_form=True).double()
    x = embedded()
    q, k, v = (m(x).unflatten(-1, (2, 3)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    own = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2) + layer.residual(x)  # type: ignore[misc]
    assert torch.allclose(layer(x), own.relu())


def test_no_layer_is_logistic_regression_and_plus_adds_an_mlp() -> None:
    index, value = torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2)
    plain = AutoInt(4, 2, blocks=())
    assert torch.allclose(plain(index, value), plain.output(plain.embed(index, value).flatten(1)))
    plus = AutoInt(4, 2, deep=(8,))
    found = plus.explain(index, value)
    alone = found.logit - plus.deep(plus.embed(index, value).flatten(1))  # type: ignore[misc]
    plus.deep = None
    assert torch.allclose(plus(index, value), alone)
    assert [w.shape for w in found.weights] == [(2, 2, 2, 2)] * 2
    assert AutoInt(4, 2, outputs=3)(index, value).shape == (2, 3)


def test_rivals_cross_fields_by_their_equations() -> None:
    e = embedded()
    pairs = sum(e[:, i] * e[:, j] for i in range(5) for j in range(i + 1, 5))
    assert torch.allclose(pairs_pooled(e), pairs)  # type: ignore[arg-type]
    assert torch.allclose(FactorisationMachine(9, 5, dim=4).crossed(e), pairs.sum(1, keepdim=True))  # type: ignore
    network = CrossNetwork(9, 5, dim=4, layers=1).double()
    x = e.flatten(1)
    crossed = x * network.weights[0](x) + network.biases[0] + x
    assert torch.allclose(network.crossed(e), network.output(crossed))
    maps = CompressedInteraction(9, 5, dim=4, maps=(3,)).double()
    outer = torch.einsum("bid,bjd->bijd", e, e)
    found = torch.einsum("hp,bpd->bh", maps.maps[0].weight, outer.flatten(1, 2))
    assert torch.allclose(maps.crossed(e), maps.output(found))


@pytest.mark.parametrize("name", RIVALS)
def test_gradients_reach_all_of_a_rival(name: str) -> None:
    model = RIVALS[name](6, 3, dim=4, deep=(5,))
    model(torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.ones(2, 3)).sum().backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None and name != "logistic regression"]
    assert not lost
    assert RIVALS[name](6, 1, dim=4)(torch.tensor([[3]]), torch.ones(1, 1)).isfinite().all()


def crossed_rows(count: int = 256) -> tuple[Rows, torch.Tensor]:
    """Three fields of three values; the class is whether the first two are equal."""
    values = torch.randint(3, (count, 3), generator=torch.Generator().manual_seed(0))
    index = values + 3 * torch.arange(3)
    return Rows(index, torch.ones(count, 3)), (values[:, 0] == values[:, 1]).long()


def test_training_learns_a_cross_and_its_map() -> None:
    rows, target = crossed_rows()
    torch.manual_seed(0)
    model = AutoInt(9, 3, dim=8, blocks=(8,))
    held = (rows.select(slice(0, 64)), target[:64])
    fitted = train_autoint(
        model, rows.select(slice(64, None)), target[64:], held, epochs=40, batch=64, lr=0.02, patience=15
    )
    found = measure(logits_of(model, held[0]), held[1])
    assert found.auc is not None
    assert found.auc > 0.95
    assert found.auc == max(fitted.scores)
    maps = interaction_maps(model, rows)
    assert torch.allclose(maps.sum(-1), torch.ones(1, 3))
    assert partner_mass(maps[0], [(0, 1)]).partners > 0


def test_training_refuses_what_it_cannot_learn() -> None:
    rows, target = crossed_rows(8)
    model = AutoInt(9, 3, blocks=())
    with pytest.raises(InputError, match="target: is 0 for all 8 rows"):
        train_autoint(model, rows, torch.zeros(8, dtype=torch.long))
    with pytest.raises(InputError, match="target: expected 8 classes"):
        train_autoint(model, rows, target[:3])
    with pytest.raises(InputError, match=r"use target.long\(\)"):
        train_autoint(model, rows, target.float())
    with pytest.raises(InputError, match="validation: holds one class"):
        train_autoint(model, rows, target, (rows, torch.zeros(8, dtype=torch.long)))
    with pytest.raises(InputError, match="no interacting layer"):
        interaction_maps(model, rows)
    with pytest.raises(InputError, match="values: expected numbers of two seeds"):
        over_seeds([0.5])
    with pytest.raises(InputError, match="crossed: expected pairs"):
        partner_mass(np.eye(2), [(0, 1)])


def test_of_several_classes_the_losses_are_those_of_torch() -> None:
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    found = measure(logits, target)
    assert found.auc is None
    assert found.log_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), abs=1e-6)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == target).float().mean()))


def test_missing_rare_and_unseen_categories_are_the_unknown_feature() -> None:
    table = {"colour": ["red", "red", "blue", None], "size": [1, 2, float("nan"), 4]}
    encoder = TableEncoder(min_count=2).fit(table)
    rows = encoder.transform({"size": [None, 1, 1], "colour": ["green", "blue", "red"], "beside": [0, 0, 0]})
    assert rows.features[:, 0].tolist() == [0, 0, 1]
    assert rows.value[0, 1] == 0
    assert encoder.names == ("colour", "size")
    assert encoder.features == 3
    again = TableEncoder.of_state(encoder.state())
    assert all(torch.equal(a, b) for a, b in zip(again.transform(table)[:2], encoder.transform(table)[:2], strict=True))


def test_several_categories_at_once() -> None:
    encoder = TableEncoder(min_count=1).fit({"genres": [["war", "drama"], ["war"], []], "year": [1990, 2000, 2010]})
    rows = encoder.transform({"genres": [["drama", "new"], None], "year": [2000, 2000]})
    assert rows.features[:, 0].tolist() == [[1, 0], [0, 0]]
    assert rows.present is not None
    assert rows.present[:, 0].tolist() == [[True, True], [True, False]]
    assert rows.present[:, 1].tolist() == [[True, False], [True, False]]
    assert AutoInt(encoder.features, 2)(*rows).shape == (2, 1)


def test_numbers_are_scaled_as_asked() -> None:
    table = {"z": [1.0, 3.0, None, 100.0]}

    def scaled(scaling: str) -> Rows:
        return TableEncoder(scaling=scaling).fit(table).transform(table)  # type: ignore[arg-type]

    assert scaled("log_square").value[:, 0].tolist() == [1.0, 1.0, 0.0, 21.0]
    assert scaled("none").value[:, 0].tolist() == [1.0, 3.0, 0.0, 100.0]
    there = scaled("standard").value[[0, 1, 3], 0]
    assert there.mean().abs() < 1e-6
    assert there.std(correction=0) == pytest.approx(1.0)
    binned = scaled("quantiles")
    assert binned.features[2, 0] == 0
    assert binned.features[0, 0] < binned.features[1, 0] < binned.features[3, 0]
    assert log_square(2.0) == 2.0
    constant = TableEncoder().fit({"c": [5, 5]}).transform({"c": [5, 6]})
    assert constant.value[:, 0].tolist() == [0.0, 1.0]


def test_whole_numbers_are_the_same_category_with_and_without_a_fraction() -> None:
    encoder = TableEncoder(["zip"], min_count=1).fit({"zip": [10, 20]})
    assert encoder.transform({"zip": [10.0, 20.0, "10"]}).features[:, 0].tolist() == [1, 2, 1]


def test_tables_come_in_many_forms() -> None:
    import pandas
    import pyarrow

    columns = {"a": [1.5, 2.5, None], "b": ["x", None, "x"]}
    encoder = TableEncoder().fit(columns)
    wanted = encoder.transform(columns)
    for table in (pandas.DataFrame(columns), pyarrow.table(columns)):
        found = TableEncoder().fit(table).transform(table)
        assert torch.equal(found.features, wanted.features)
        assert torch.equal(found.value, wanted.value)
    assert TableEncoder().fit(np.eye(3)).names == ("x0", "x1", "x2")
    nothing = encoder.transform({"a": [], "b": []})
    assert nothing.features.shape == (0, 2)


def test_tables_that_cannot_be_used_are_refused() -> None:
    encoder = TableEncoder(min_count=1).fit({"a": [1.0, 2.0], "b": [["x"], ["y"]], "c": ["u", "v"]})
    with pytest.raises(InputError, match="lacks the columns b, c"):
        encoder.transform({"a": [1.0]})
    with pytest.raises(InputError, match="column 'a' holds 'one'"):
        encoder.transform({"a": ["one"], "b": [["x"]], "c": ["u"]})
    with pytest.raises(InputError, match="column 'b' holds 'x'"):
        encoder.transform({"a": [1.0], "b": ["x"], "c": ["u"]})
    with pytest.raises(InputError, match="column 'c' holds several"):
        encoder.transform({"a": [1.0], "b": [["x"]], "c": [["u"]]})
    with pytest.raises(InputError, match="infinite"):
        encoder.transform({"a": [float("inf")], "b": [["x"]], "c": ["u"]})
    with pytest.raises(InputError, match="several lengths"):
        encoder.transform({"a": [1.0], "b": [], "c": []})
    with pytest.raises(InputError, match="categorical: z is no column"):
        TableEncoder(["z"]).fit({"a": [1]})
    with pytest.raises(InputError, match="has no rows"):
        TableEncoder().fit({"a": []})
    with pytest.raises(InputError, match="has no columns"):
        TableEncoder().fit({})
    with pytest.raises(InputError, match="expected a data frame"):
        TableEncoder().fit([1, 2])
    with pytest.raises(InputError, match="fit it first"):
        TableEncoder().transform({"a": [1]})
    with pytest.raises(InputError, match="state: is not that"):
        TableEncoder.of_state({"columns": []})
