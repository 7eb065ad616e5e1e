"""Attentive statistics pooling that sees the statistics of its set, against the form that concatenates them to every token.

32 sets of 300 frames of width 1536 in float32, hidden width 128, one weight per channel. The concatenating form is
that of speechbrain, written out in plain torch (`[mean; std]` repeated for every frame, 1x1 convolutions), as
speechbrain needs a torchaudio that its torch may not have. Tokens stand as each of the two wants them: `[batch,
tokens, dim]` here, `[batch, dim, tokens]` there. Parameters and results are the same; the ReLU and BatchNorm that
speechbrain puts behind the first layer are left out of both.

    python -m benchmarks.attentive_statistics [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor, nn

from cenote.pool import AttentiveStatisticsPool

BATCH, TOKENS, DIM, HIDDEN, EPS = 32, 300, 1536, 128, 1e-5


class Concatenating(nn.Module):
    """`softmax(W_2 tanh(W_1 [x; mean; std]))` per channel, then mean and deviation under these weights."""

    def __init__(self, pool: AttentiveStatisticsPool) -> None:
        super().__init__()
        assert pool.context is not None
        self.first = nn.Conv1d(3 * DIM, HIDDEN, 1)
        self.second = nn.Conv1d(HIDDEN, DIM, 1)
        first = torch.cat([pool.token.weight, pool.context.weight], 1)
        for target, source in (
            (self.first.weight, first.unsqueeze(-1)),
            (self.first.bias, pool.token.bias),
            (self.second.weight, pool.score.weight.unsqueeze(-1)),
            (self.second.bias, pool.score.bias),
        ):
            target.data.copy_(source.detach())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[-1]
        mean, std = self.statistics(x, torch.full_like(x[:, :1], 1 / tokens))
        mean, std = (v.unsqueeze(2).repeat(1, 1, tokens) for v in (mean, std))
        scores = self.second(torch.tanh(self.first(torch.cat([x, mean, std], 1))))
        return torch.cat(self.statistics(x, scores.softmax(2)), 1)

    def statistics(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mean = (weights * x).sum(2)
        variance = (weights * (x - mean.unsqueeze(2)).pow(2)).sum(2)
        return mean, variance.clamp(min=EPS).sqrt()


def gradients(pool: nn.Module, y: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, list(pool.parameters()), upstream)


def pairs() -> Iterator[Pair]:
    torch.manual_seed(0)
    ours = AttentiveStatisticsPool(DIM, HIDDEN, eps=EPS)
    theirs = Concatenating(ours)
    x = torch.randn(BATCH, TOKENS, DIM)
    channels_first = x.transpose(1, 2).contiguous()
    upstream = torch.randn(BATCH, 2 * DIM)
    few = x[:2, :50].double()
    with torch.no_grad():
        require_same(ours(x), theirs(channels_first))
        precise = copy.deepcopy(ours).double()
        precise.CONTEXT_EPS = 0.0  # added to the first variance, where they have a floor
        require_same(precise(few), copy.deepcopy(theirs).double()(few.transpose(1, 2)))
        yield Pair(
            "attentive statistics, 32 x 300 x 1536, forward",
            "AttentiveStatisticsPool",
            lambda: ours(x),
            "concatenated, as speechbrain, in plain torch",
            lambda: theirs(channels_first),
            target=1.7,
            memory_target=2,
        )
    yield Pair(
        "attentive statistics, 32 x 300 x 1536, trained",
        "AttentiveStatisticsPool",
        lambda: gradients(ours, ours(x), upstream),
        "concatenated, as speechbrain, in plain torch",
        lambda: gradients(theirs, theirs(channels_first), upstream),
        target=1.7,
        memory_target=2,
    )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.attentive_statistics", rounds=10)
