"""The whole language model, with contextual positions and with those that they are compared with.

Source: Golovneva, Wang, Weston and Sukhbaatar, "Contextual Position Encoding" (2024), arXiv 2405.18719.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.seeded import seeded
from cenote.mix.base import ScoreModifier
from cenote.mix.contextual_position_encoding.scores import CoPE, GateKeys
from cenote.mix.contextual_position_encoding.tasks import flip_flop
from cenote.mix.position_scores import DotProduct, RelativeTable, Rotary
from cenote.mix.scored_decoder import ScoredDecoder, next_token_losses
from cenote.mix.trained import trained

Encoding = Literal["cope", "cope+rel", "rel", "abs", "abs+rel", "rope", "none"]


class CoPETransformer(ScoredDecoder):
    """A causal language model whose tokens are counted by gates.

    Args:
        vocabulary: number of tokens.
        block: how many tokens it is built for; of tables of distances and of absolute positions.
        encoding: `"cope"`; its rivals, in the same model: learned absolute positions, a learned table of distances, both,
            rotary positions, none; `"cope+rel"`: both added.
        positions: of the table of `CoPE`; `block + 1` by default.
        every: with `"cope+rel"`, contextual positions in every so many-th layer, distances alone in the others.
        shared: one table for all layers.
        gate_keys, scaled_gates, scaled_positions: as `CoPE`.
        layers, dim, heads, dropout: as published.
        pre_norm: the authors' model has norms behind; small ones train better with norms before.

    Example:
        >>> model = CoPETransformer(11, block=16, layers=2, dim=16, heads=2).eval()
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 11])

    Source: Golovneva et al. (2024), arXiv 2405.18719.
    """

    def __init__(
        self,
        vocabulary: int,
        block: int = 512,
        encoding: Encoding = "cope",
        positions: int | None = None,
        every: int = 1,
        shared: bool = False,
        gate_keys: GateKeys = "keys",
        scaled_gates: bool = True,
        scaled_positions: bool = True,
        layers: int = 4,
        dim: int = 256,
        heads: int = 4,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        require_one_of(get_args(Encoding), encoding=encoding)
        require_at_least(1, block=block, every=every, heads=heads)
        if every > 1 and encoding != "cope+rel":
            raise InputError(f"every: layers between need distances; take encoding='cope+rel', not {encoding!r}")
        width = dim // heads
        given: dict[str, Any] = {
            "gate_keys": gate_keys,
            "scaled_gates": scaled_gates,
            "scaled_positions": scaled_positions,
        }
        one: list[CoPE] = []

        def cope() -> CoPE:
            if not one or not shared:
                relative = block if encoding == "cope+rel" else None
                one.append(CoPE(width, block + 1 if positions is None else positions, relative=relative, **given))
            return one[-1]

        def scores(layer: int) -> ScoreModifier:
            if encoding in ("cope", "cope+rel"):
                return RelativeTable(width, block) if (layer + 1) % every else cope()
            if encoding in ("rel", "abs+rel"):
                return RelativeTable(width, block)
            return Rotary(width) if encoding == "rope" else DotProduct()

        absolute = block if encoding in ("abs", "abs+rel") else None
        super().__init__(vocabulary, scores, layers, dim, heads, absolute=absolute, pre_norm=pre_norm, dropout=dropout)
        self.encoding, self.block = encoding, block


def answer_loss(
    model: ScoredDecoder, tokens: Int[Tensor, "batch tokens"], answers: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the tokens that are answers, and of no others."""
    losses = next_token_losses(model(tokens).logits, tokens)
    counted = answers[:, 1:]
    return (losses * counted).sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def answer_error(
    model: ScoredDecoder, tokens: Int[Tensor, "batch tokens"], answers: Bool[Tensor, "batch tokens"]
) -> float:
    """Share of the answers that the model would not have given."""
    wrong = model(tokens).logits[:, :-1].argmax(-1) != tokens[:, 1:]
    return float(wrong[answers[:, 1:]].double().mean())


def flip_flop_errors(
    model: ScoredDecoder,
    shares: Sequence[float] = (0.1, 0.5, 0.8, 0.98),
    pairs: Sequence[int] = (32,),
    texts: int = 256,
    random_state: int = 0,
) -> dict[tuple[float, int], float]:
    """Share of wrong bits in the flip-flop language, by share of `ignore` and number of pairs: those of training and others."""
    found = {}
    for share in shares:
        for count in pairs:
            task = flip_flop(texts, count, share, torch.Generator().manual_seed(random_state))
            found[share, count] = answer_error(model, *task)
    return found


def small_flip_flop(
    encoding: Encoding = "cope",
    steps: int = 700,
    pairs: int = 32,
    shares: Sequence[float] = (0.5, 0.8),
    random_state: int = 0,
) -> CoPETransformer:
    """A model of two layers of 32 channels and two heads, trained on the flip-flop language by Adam at 1e-3 on batches of 32.

    Args:
        encoding: of positions; `"cope"` with 16 of them.
        steps, pairs: of the training.
        shares: of `ignore`, one after the other.
        random_state: of parameters and texts.
    """
    with seeded(random_state):
        model = CoPETransformer(
            5, 2 * pairs, encoding, positions=16, layers=2, dim=32, heads=2, dropout=0.0, pre_norm=True
        )
    generator = torch.Generator().manual_seed(random_state)
    train_answers(model, lambda step: flip_flop(32, pairs, shares[step % len(shares)], generator), steps, lr=1e-3)
    return model


def train_answers(
    model: ScoredDecoder,
    draw: Callable[[int], tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]],
    steps: int,
    lr: float = 7e-5,
) -> list[float]:
    """Adam on the answers alone; published are a rate of 7e-5, batches of 64, 100 passes; small models take 1e-3.

    Args:
        draw: tokens and which are answers, of each step.
        steps: how many.
        lr: rate.

    Returns:
        The loss of every step.
    """
    return trained(model, lambda step: answer_loss(model, *draw(step)), torch.optim.Adam(model.parameters(), lr), steps)
