from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from cenote.jobs.probe import Probe
from cenote.pool import EfficientProbing
from cenote.study.harness import training
from cenote.study.harness.batches import split_at, stacked, unstacked
from cenote.study.harness.training import Together, accuracy, cross_entropy, epochs, fit, outputs

SEEDS = (4, 7)


def _build() -> nn.Module:
    return Probe(EfficientProbing(8, queries=2), 3)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 5, 8, generator=g)
    return x, torch.randint(3, (2, 40), generator=g)


@pytest.mark.parametrize("in_turn", [False, True])
def test_copies_train_as_if_alone(in_turn: bool) -> None:
    x, y = _data()
    together = Together(_build, SEEDS, in_turn)
    fit(together, epochs(x, y, 10, SEEDS), cross_entropy, 8, 1e-2)
    for i, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        alone = _build().train()
        optimiser = torch.optim.AdamW(alone.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 8)
        batches = epochs(x[i : i + 1], y[i : i + 1], 10, [seed])
        for _, (bx, by) in zip(range(8), batches, strict=False):
            optimiser.zero_grad()
            F.cross_entropy(alone(bx[0]), by[0]).backward()
            optimiser.step()
            schedule.step()
        copy = together.module(i)
        for (name, ours), theirs in zip(copy.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        # the running statistics of the BatchNorm moved as well
        assert int(copy.norm.num_batches_tracked) == 8  # type: ignore[union-attr, arg-type]


def test_own_rate_moves_one_parameter_alone() -> None:
    x, y = _data()
    model = Together(_build, SEEDS)
    start = {k: v.detach().clone() for k, v in model.parameters.items()}
    fit(model, epochs(x, y, 10, SEEDS), cross_entropy, 2, 0.0, own_rates={"pool.cls_token": 0.1}, weight_decay=0.0)
    moved = {k for k, v in model.parameters.items() if not torch.equal(v.detach(), start[k])}
    assert moved == {"pool.cls_token"}


def test_frozen_parameters_stay() -> None:
    def build() -> nn.Module:
        module = _build()
        module.pool.v.weight.requires_grad_(False)  # type: ignore[union-attr]
        return module

    x, y = _data()
    model = Together(build, SEEDS)
    before = model.parameters["pool.v.weight"].clone()
    fit(model, epochs(x, y, 10, SEEDS), cross_entropy, 2, 0.1)
    assert torch.equal(model.parameters["pool.v.weight"], before)
    assert model.size() == sum(p.numel() for p in _build().parameters()) - 64


def test_epochs_show_every_item_once_and_repeat_for_the_same_seeds() -> None:
    x = torch.arange(12.0).expand(2, 12).unsqueeze(-1)
    seen = [batch[0] for _, batch in zip(range(3), epochs(x, x, 4, SEEDS), strict=False)]
    for s in range(2):
        assert sorted(torch.cat([b[s] for b in seen]).flatten().tolist()) == list(range(12))
    again = [batch[0] for _, batch in zip(range(3), epochs(x, x, 4, SEEDS), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    assert not torch.equal(seen[0][0], seen[0][1])


def test_decays() -> None:
    assert training.cosine(0.0) == 1.0
    assert training.cosine(1.0) == pytest.approx(0.0)
    assert [training.tenth_at_half(s) for s in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 0.1, 0.1]


class Labelled(NamedTuple):
    words: Int[Tensor, "*items words"]
    mask: Bool[Tensor, "*items words"]


class Reader(nn.Module):
    """Knows the fields of its batch, as nothing of the training does."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3)

    def forward(self, x: Labelled) -> torch.Tensor:
        assert x.words.dtype == torch.int64
        assert x.mask.dtype == torch.bool
        return (self.words(x.words) * x.mask.unsqueeze(-1)).sum(1)


def _labelled() -> tuple[Labelled, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    words = torch.randint(7, (2, 20, 4), generator=g)
    return Labelled(words, words > 2), torch.randint(3, (2, 20), generator=g)


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_model_gets_its_batch_as_it_is(in_turn: bool) -> None:
    (train_x, train_y), (test_x, test_y) = split_at(_labelled(), 12)
    model = Together(Reader, SEEDS, in_turn)
    fit(model, epochs(train_x, train_y, 4, SEEDS), cross_entropy, 3, 0.1)
    found = outputs(model, test_x, batch=3)
    alone = [module(own) for module, own in zip(model.modules(), unstacked(test_x, 2), strict=True)]
    torch.testing.assert_close(found, torch.stack(alone))
    assert accuracy(model, test_x, test_y) == tuple((found.argmax(-1) == test_y).double().mean(1).tolist())


def test_batches_keep_fields_and_labels_together() -> None:
    items = torch.arange(10).expand(2, 10)
    x = Labelled(items.unsqueeze(-1), items.unsqueeze(-1) > 4)
    for _, (batch, y) in zip(range(4), epochs(x, items, 5, SEEDS), strict=False):
        assert type(batch) is Labelled
        assert torch.equal(batch.words.squeeze(-1), y)
        assert torch.equal(batch.mask.squeeze(-1), y > 4)


def test_stacked_and_back() -> None:
    x, y = _labelled()
    own = unstacked((x, y), 2)
    again_x, again_y = stacked(own)
    assert type(again_x) is Labelled
    assert all(map(torch.equal, (*again_x, again_y), (*x, y)))
