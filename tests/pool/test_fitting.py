"""A winner is the same model wherever it is used: probe, estimator, extraction and bridges give one vector."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pools import QUICK_SETTINGS
from torch import Tensor

from cenote.bridges.scikit_learn import ProbeClassifier
from cenote.bridges.sentence_transformers import CenotePooling
from cenote.bridges.transformers import PooledModel
from cenote.catalog import create, method, methods
from cenote.core import Bags, InputError
from cenote.core.graphs import Graphs
from cenote.features import LayeredDataset, digits
from cenote.jobs.extract.work import token_pool
from cenote.jobs.probe.module import Probe, build_probe
from cenote.pool.fitting import FittedPool, Known, decided_arguments, form_of, require_runs_on

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'cenote[models]'")

DIM, BLOCKS, PATCHES = 16, 3, 4
SETS = [m.name for m in methods(room="pool", kind="sets")]
STACKS = [m.name for m in methods(room="pool", kind="layers")]
FIXED = [name for name in SETS if "tokens" in decided_arguments(name, Known(DIM, tokens=PATCHES))]
SHORTER = {"right": (0, 2, 1), "left": (0, 2, 1), "none": (0, 0, 0), "equal": (0, 0, 0)}


class Texts:
    """Three texts through one tiny BERT, padded at one side, not at all, or by the same slot in each."""

    def __init__(self, padding: str, prefix_tokens: int) -> None:
        longest = PATCHES + prefix_tokens
        self.prefix_tokens = prefix_tokens
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=DIM, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=32
        )
        self.model = transformers.BertModel(config).eval()
        self.lengths = longest - torch.tensor(SHORTER[padding])
        slots = longest if padding == "none" else longest + 1
        lengths, at = self.lengths.unsqueeze(1), torch.arange(slots)
        self.mask = at < lengths if padding in ("right", "none") else at >= slots - lengths
        ids = torch.randint(1, 40, (3, slots), generator=torch.Generator().manual_seed(1))
        self.inputs = {"input_ids": ids, "attention_mask": self.mask.long()}
        with torch.no_grad():
            states = self.model(**self.inputs, output_hidden_states=True).hidden_states
        states = tuple(h.masked_fill(~self.mask.unsqueeze(-1), torch.nan) for h in states)
        self.stack = torch.stack(states[1:], 1)
        self.features = {
            "token_embeddings": states[-1],
            "attention_mask": self.inputs["attention_mask"],
            "all_layer_embeddings": states,
        }

    def padded(self, name: str) -> Tensor:
        return self.stack if name in STACKS else self.stack[:, -1]

    def data(self, name: str) -> Any:
        """As the probe reads them: ragged, unless the pool wants as many tokens in each item."""
        rows = self.stack.transpose(1, 2)[self.mask].flatten(1)
        x: Any = Bags(rows, torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)))
        if name in FIXED:
            x = rows.view(3, -1, BLOCKS, DIM).transpose(1, 2).contiguous()
        y = torch.tensor([0, 1, 0])
        known = {"prefix_tokens": self.prefix_tokens, "layers": tuple(range(1, BLOCKS + 1))}
        held = LayeredDataset("texts", x, y, "binary", ("a", "b"), ("0", "1", "2"), y * 0, **known)
        return held if name in STACKS else held.at(BLOCKS)


texts_of = cache(Texts)
CASES = [
    pytest.param(name, padding, id=f"{name}-{padding}")
    for name in SETS + STACKS
    for padding in SHORTER
    # as many tokens in every item
    if name not in FIXED or padding in ("none", "equal")
]


def redrawn(probe: Probe) -> Probe:
    """Every parameter drawn anew: zeros and ones at initialisation hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in probe.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return probe.eval()


def assert_same(found: Tensor, expected: Tensor, where: str) -> None:
    torch.testing.assert_close(
        found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5, msg=lambda text: f"{where}: {text}"
    )


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_one_pool_gives_one_vector_everywhere(name: str, padding: str, prefix: int) -> None:
    texts, settings = texts_of(padding, prefix), QUICK_SETTINGS.get(name, {})
    data = texts.data(name)
    if prefix == 0 and getattr(method(name).load(), "reads_cls", False):
        with pytest.raises(InputError, match=rf"{name}: reads \[CLS\], and these data have no prefix tokens"):
            build_probe(name, data, settings)
        return
    probe = redrawn(build_probe(name, data, settings))
    x, mask = data.batch(torch.arange(3))
    expected = probe.pooled(x, mask)
    assert expected.isfinite().all()
    assert expected.std() > 0
    padded = texts.padded(name)
    assert_same(probe.pooled(padded, texts.mask), expected, "the probe on other padding")

    # texts have any length: a bridge must be told
    told = settings | ({"tokens": PATCHES} if name in FIXED else {})
    model = PooledModel(texts.model, name, prefix, **told).eval()
    model.pool.load_state_dict(probe.pool.state_dict())
    assert_same(model(**texts.inputs).embedding, expected, "PooledModel")
    pooling = CenotePooling(name, DIM, BLOCKS, prefix_tokens=prefix, **told).eval()
    pooling.pool.load_state_dict(probe.pool.state_dict())
    assert_same(pooling(dict(texts.features))["sentence_embedding"], expected, "CenotePooling")

    if name in STACKS:
        return
    estimator = ProbeClassifier(name, settings=settings, prefix_tokens=prefix)
    estimator.probe_ = probe
    sets = [x[real] for x, real in zip(padded, texts.mask, strict=True)]
    given = torch.stack(sets).numpy() if name in FIXED else [s.numpy() for s in sets]
    assert_same(torch.as_tensor(estimator.transform(given)), expected, "ProbeClassifier.transform")
    if name not in FIXED and not [*probe.pool.parameters()] and expected.shape[1] == DIM:
        stored = token_pool(name, DIM, prefix)
        assert stored is not None
        assert_same(stored.pooled(padded, texts.mask), expected, "pool-at-extract")


@torch.no_grad()
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_a_hidden_token_reaches_nothing(name: str, padding: str) -> None:
    texts = texts_of(padding, 1)
    arguments = decided_arguments(name, Known(DIM, 1, PATCHES + 1, BLOCKS))
    pool = create(name, dim=DIM, **arguments, **QUICK_SETTINGS.get(name, {})).eval()
    fitted, x = FittedPool(pool, prefix_tokens=1), texts.padded(name)
    first = texts.mask & (texts.mask.cumsum(1) == 1)
    other = x.masked_fill((first if x.dim() == 3 else first.unsqueeze(1)).unsqueeze(-1), 7.0)
    reads_it = pool.reads_cls if form_of(pool) == "layers" else pool.prefix == "keep"
    assert fitted.hidden == (0 if reads_it else 1)
    if not reads_it:
        assert torch.equal(fitted.pooled(x, texts.mask), fitted.pooled(other, texts.mask))
        weights = fitted.attend(x, texts.mask)[1]
        if weights is not None:
            assert weights.movedim(-1, 1)[first | ~texts.mask].eq(0).all()
            assert weights.movedim(-1, 1)[texts.mask & ~first].any()
    elif name != "last":
        assert not torch.allclose(fitted.pooled(x, texts.mask), fitted.pooled(other, texts.mask))


def test_the_arguments_that_the_tokens_decide() -> None:
    known = Known(8, prefix_tokens=4, tokens=20, layers=6)
    assert decided_arguments("cls-mean", known) == {"prefix_tokens": 4}
    assert decided_arguments("clip", known) == {"tokens": 16}
    assert decided_arguments("weighted-layer-sum", known) == {"layers": 6}
    assert decided_arguments("mean", known) == {}
    with pytest.raises(InputError, match="abmilp-positions: needs the same number of tokens in every item"):
        require_runs_on("abmilp-positions", Known(8))
    with pytest.raises(InputError, match=r"max-cls: reads \[CLS\], and these data have no prefix tokens"):
        require_runs_on("max-cls", Known(8, layers=3))


def test_graphs_are_shown_whole() -> None:
    pool = create("sparse-hierarchical", dim=3, hidden=4, blocks=1).eval()
    nodes, offsets = torch.randn(4, 3), torch.tensor([0, 4])
    graphs = Graphs(nodes, offsets, torch.tensor([[0, 1], [1, 0]]))
    assert torch.equal(FittedPool(pool, 1).pooled(graphs), pool(graphs))
    with pytest.raises(InputError, match="takes Graphs, got Tensor"):
        FittedPool(pool).pooled(nodes)


def test_a_saved_probe_keeps_the_names_of_its_weights() -> None:
    assert {k.split(".")[0] for k in build_probe("simpool", digits()).state_dict()} == {"pool", "norm", "classifier"}


@pytest.mark.parametrize("name", ["weighted-layer-sum", "max-cls"])
def test_pools_of_layers_are_refused_at_extraction(name: str) -> None:
    with pytest.raises(InputError, match=f"pool-at-extract: {name} pools layers"):
        token_pool(name, 8, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["weighted-layer-sum", "simpool", "cls-mean"])
def test_a_saved_pooling_keeps_its_prefix(name: str, tmp_path: Path) -> None:
    texts, pooling = texts_of("left", 2), CenotePooling(name, DIM, BLOCKS, prefix_tokens=2)
    pooling.save(str(tmp_path))
    again = CenotePooling.load(str(tmp_path))
    assert again.prefix_tokens == 2
    y = pooling(dict(texts.features))["sentence_embedding"]
    assert torch.equal(again(dict(texts.features))["sentence_embedding"], y)
