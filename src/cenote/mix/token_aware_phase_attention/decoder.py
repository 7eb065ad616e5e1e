"""A whole decoder with phases in place of positions, its rivals, its training, and how it does on longer texts.

Source: Wang et al. (2025), arXiv 2509.12635.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core import InputError, files
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.seeded import seeded
from cenote.mix.base import ScoreModifier
from cenote.mix.position_scores import DotProduct, Rotary
from cenote.mix.scored_decoder import ScoredDecoder, next_token_losses
from cenote.mix.token_aware_phase_attention.scores import TAPA, GeneralPhase
from cenote.mix.trained import trained

Encoding = Literal["tapa", "general", "linear", "rope", "interpolated", "yarn", "none"]
CARD, TENSORS, FORMAT = "tapa_decoder.json", "tapa_decoder.safetensors", 1


@dataclass(frozen=True)
class TAPAConfig:
    """What a `TAPADecoder` is built of.

    Attributes:
        vocabulary, layers, dim, heads, kv_heads, inner: as usual; `kv_heads` and `inner` have defaults of their own.
        encoding: `"tapa"`; `"general"` and `"linear"`: learned maps, with a quadratic or a linear phase; its rivals: `"rope"`,
            `"interpolated"`, `"yarn"` (rotary positions, stretched by `factor` behind `trained`), `"none"`.
        theta, alpha: as of `TAPA`.
        base: of rotary frequencies; 5e5 as published, 2e8 for the rival with a larger base.
        factor, trained: of the stretch.
        tied: whether the output map is the embedding.
    """

    vocabulary: int
    layers: int = 4
    dim: int = 128
    heads: int = 4
    kv_heads: int | None = None
    inner: int | None = None
    encoding: Encoding = "tapa"
    theta: float = 0.5
    alpha: float = 0.1
    base: float = 5e5
    factor: float = 1.0
    trained: int = 2048
    tied: bool = False

    def __post_init__(self) -> None:
        require_one_of(get_args(Encoding), encoding=self.encoding)

    def scores(self) -> ScoreModifier:
        """Of one layer."""
        width = self.dim // self.heads
        if self.encoding == "tapa":
            TAPA(self.theta, self.alpha).split(width)
            return TAPA(self.theta, self.alpha)
        if self.encoding in ("general", "linear"):
            return GeneralPhase(width, self.alpha, "linear" if self.encoding == "linear" else "quadratic")
        if self.encoding == "none":
            return DotProduct()
        stretch = "none" if self.encoding == "rope" else self.encoding
        return Rotary(width, self.base, stretch, self.factor, self.trained)  # type: ignore[arg-type]


class TAPADecoder(ScoredDecoder):
    """A decoder like Llama's (RMSNorm, SwiGLU, grouped keys, no biases) whose scores are phases, without any added position.

    Keys are cached as they come, and distances made of their places, so that a longer text needs nothing changed.

    Args:
        config: what it is built of.

    Example:
        >>> model = TAPADecoder(TAPAConfig(vocabulary=11, layers=1, dim=16, heads=2, kv_heads=1)).eval()
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 11])

    Source: Wang et al. (2025), arXiv 2509.12635.
    """

    def __init__(self, config: TAPAConfig) -> None:
        inner = config.inner if config.inner is not None else 8 * config.dim // 3
        super().__init__(
            config.vocabulary,
            lambda _: config.scores(),
            config.layers,
            config.dim,
            config.heads,
            config.kv_heads,
            inner,
            norm="rms",
            feed_forward="gated",
            tied=config.tied,
            bias=False,
        )
        self.config = config

    def save(self, folder: str | Path) -> None:
        """Write configuration and weights."""
        place = Path(folder)
        card = {"format": FORMAT, "config": dataclasses.asdict(self.config)}
        files.write_saved(place / CARD, place / TENSORS, card, self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> TAPADecoder:
        """What `save` wrote, in eval mode.

        Raises:
            InputError: where the folder holds no such model.
        """
        place = Path(folder)
        try:
            card, state = files.read_saved(place / CARD, place / TENSORS, "train it again", format=int, config=dict)
            files.require_format(place, card, FORMAT)
            model = cls(TAPAConfig(**card["config"]))
            model.load_state_dict(state)
        except InputError:
            raise
        except (OSError, TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{place}: holds no whole decoder ({error}); name the folder of save") from error
        return model.eval()


class Lengths(NamedTuple):
    """Mean loss in nats by length of context.

    Attributes:
        losses: of each length.
        gain: loss at the first length less that at the last: positive where longer texts are read better.
    """

    losses: dict[int, float]
    gain: float

    def perplexity(self) -> dict[int, float]:
        """The same as perplexity."""
        return {length: math.exp(loss) for length, loss in self.losses.items()}


def train_tapa(
    model: ScoredDecoder,
    draw: Callable[[int], Int[Tensor, "batch tokens"]],
    steps: int = 200_000,
    lr: float = 2e-5,
    warm_up: float = 0.025,
) -> list[float]:
    """AdamW (.9, .95) without decay, warm-up, cosine to a tenth; for training and for extension to longer texts alike.

    Published: 200,000 steps of 256 texts of 8,192 tokens, warm-up of 5,000; peak rates of 2e-5 for TAPA and 1e-4 for rotary
    positions. Extension is the same with longer texts: 500 steps at 2e-5, warm-up of 50 (0.1 of them). Small models take 1e-3.

    Args:
        draw: texts of each step.
        steps, lr, warm_up: as published; the warm-up is a share of the steps.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    return trained(
        model, lambda step: _loss(model, draw(step)), optimizer, steps, warm_up=warm_up, falls_to=0.1, clip=1.0
    )


@torch.no_grad()
def length_table(model: ScoredDecoder, text: Int[Tensor, "tokens"], lengths: Sequence[int], last: int = 64) -> Lengths:
    """Mean loss of the same targets with more and more context: the last tokens of windows that end at the same places.

    Args:
        text: a long one, never trained on.
        lengths: of the windows, say 1, 2 and 4 times that of training.
        last: so many tokens at the end of each window are targets.

    Raises:
        InputError: where the text is shorter than the longest window.
    """
    require_at_least(2, lengths=min(lengths, default=0))
    require_at_least(1, last=last)
    longest = max(lengths)
    if len(text) < longest or last >= min(lengths):
        raise InputError(
            f"text: windows of {longest} tokens of {len(text)}, {last} targets in {min(lengths)}; give a longer text, or "
            f"fewer of them"
        )
    ends = range(longest, len(text) + 1, last)
    losses = {}
    for length in lengths:
        windows = [text[None, end - length : end] for end in ends]
        found = [next_token_losses(model(w).logits, w)[0, -last:] for w in windows]
        losses[length] = float(torch.cat(found).double().mean())
    return Lengths(losses, losses[lengths[0]] - losses[lengths[-1]])


class Compared(NamedTuple):
    """An arm of `compare_encodings`: the rate that was best for it, its loss by length, before and after extension."""

    rate: float
    lengths: Lengths
    extended: Lengths | None


def compare_encodings(
    configs: Mapping[str, TAPAConfig],
    draw: Callable[[int, int], Int[Tensor, "batch tokens"]],
    text: Int[Tensor, "tokens"],
    lengths: Sequence[int],
    steps: int,
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    extension: int = 0,
    last: int = 64,
    random_state: int = 0,
) -> dict[str, Compared]:
    """Arms side by side: every one is trained at each of the same rates, and the best of them at the first length is kept.

    Args:
        configs: the arms; sweeps of theta and alpha are arms too.
        draw: texts of a step, of a length.
        text: never trained on.
        lengths: of `length_table`; the first is that of training, the last that of extension.
        steps: of training.
        rates: of which each arm is given its own best.
        extension: steps at the last length behind it, at a tenth of the rate; 0 for none.
        last: of `length_table`.
        random_state: of the parameters.
    """
    found = {}
    for name, config in configs.items():
        tried = []
        for rate in rates:
            with seeded(random_state):
                model = TAPADecoder(config)
            train_tapa(model, lambda step: draw(step, lengths[0]), steps, rate)
            tried.append((length_table(model, text, lengths, last), rate, model))
        table, rate, model = min(tried, key=lambda t: t[0].losses[lengths[0]])
        extended = None
        if extension:
            train_tapa(model, lambda step: draw(steps + step, lengths[-1]), extension, rate / 10, 0.1)
            extended = length_table(model, text, lengths, last)
        found[name] = Compared(rate, table, extended)
    return found


def _loss(model: ScoredDecoder, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    return next_token_losses(model(tokens).logits, tokens).mean()
