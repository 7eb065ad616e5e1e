"""A decoder whose layers take each a form of attention of their own.

Source: Xue, Moosavi, Aletras, "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.deconstructing_attention.forms import (
    CausalForm,
    DotProductForm,
    GatedMLPForm,
    RunningForm,
    SilentForm,
    Taylor,
    TaylorForm,
)
from cenote.mix.fitting import in_training

Variant = Literal["standard", "mlp", "approx", "nonapprox", "rndembqk", "fixedseqqk", "staticembqk", "silent"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
SIDE: tuple[Variant, ...] = ("rndembqk", "fixedseqqk")
"""Forms whose queries and keys come from a stream of their own, the same for all inputs."""
Layout = Literal["uniform", "even", "odd", "top", "middle", "bottom", "quarter", "first", "last", "ends"]
EPS = 1e-6


class Size(NamedTuple):
    """Width, layers, heads and inner width of the perceptrons."""

    dim: int
    layers: int
    heads: int
    inner: int


SIZES: Mapping[str, Size] = {
    "70M": Size(512, 6, 8, 2048),
    "160M": Size(768, 12, 12, 3072),
    "500M": Size(896, 24, 14, 4864),
    "1.7B": Size(2048, 28, 16, 6144),
}


def layout(name: Layout, variant: Variant, layers: int) -> tuple[Variant, ...]:
    """Which form each layer takes.

    Args:
        name: where standard attention stays: nowhere (`"uniform"`), in every second layer (`"even"`, the published hybrid, or
            `"odd"`, counted from 1), in the upper, middle or lower half (`"top"`, `"middle"`, `"bottom"`), in each fourth
            (`"quarter"`), in the `"first"` or `"last"` alone, or in both (`"ends"`).
        variant: what stands everywhere else.
        layers: their number.

    Example:
        >>> layout("even", "mlp", 4)
        ('mlp', 'standard', 'mlp', 'standard')
    """
    require_one_of(get_args(Layout), name=name)
    require_one_of(VARIANTS, variant=variant)
    require_at_least(1, layers=layers)
    half = layers // 2
    middle = (layers - half) // 2
    stays: Mapping[str, Collection[int]] = {
        "uniform": (),
        "even": range(1, layers, 2),
        "odd": range(0, layers, 2),
        "top": range(layers - half, layers),
        "middle": range(middle, middle + half),
        "bottom": range(half),
        "quarter": range(3, layers, 4),
        "first": (0,),
        "last": (layers - 1,),
        "ends": (0, layers - 1),
    }
    return tuple("standard" if i in stays[name] else variant for i in range(layers))


class DecoderBlock(nn.Module):
    """`h = h + form(norm(h))`, `h = h + MLP(norm(h))`, the perceptron gated by a SiLU, norms by root mean squares.

    Args:
        dim, heads, inner: widths.
        variant: the form in attention's place.
        taylor: of `"approx"`.
    """

    def __init__(self, dim: int, heads: int, inner: int, variant: Variant, taylor: Taylor = "joint") -> None:
        super().__init__()
        self.variant = variant
        self.norm1, self.norm2 = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)
        self.form = _form(variant, dim, heads, taylor)
        self.gate, self.up = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        h: Float[Tensor, "batch tokens dim"],
        asks: Float[Tensor, "#batch tokens dim"] | None,
        positions: Int[Tensor, "#batch tokens"],
        state: Any = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Any]:
        """The next stream, and the form's state.

        Args:
            h: the stream.
            asks: the stream that queries and keys are made of; None for `h`.
            positions: of the tokens.
            state: of an earlier call.
        """
        x = self.norm1(h)
        y, state = self.form.run(x, x if asks is None else self.norm1(asks), None, positions, state)
        h = h + y
        x = self.norm2(h)
        return h + self.down(F.silu(self.gate(x)) * self.up(x)), state


class MixedDecoder(nn.Module):
    """A language model with a form of attention for each layer, all of them of equal size.

    `"standard"` is softmax attention with rotary positions. `"mlp"` mixes nothing. `"approx"` expands the exponential by
    Taylor's series. `"nonapprox"` is a running softmax without queries. Of the static forms queries and keys are made of
    another stream than values: of a fixed random table (`"rndembqk"`) or a fixed text (`"fixedseqqk"`), which pass through the
    same blocks, or of the embeddings of the text itself (`"staticembqk"`). `"silent"` adds nothing.

    Args:
        vocabulary: number of tokens.
        variants: the form of each layer, as `layout` gives them.
        dim, heads, inner: widths; `inner` of the perceptrons, default 4 `dim`.
        longest: number of positions of the fixed streams.
        text: the fixed text of `"fixedseqqk"`, `longest` tokens or more.
        taylor: of `"approx"`.
        spread: deviation of the random table.
        tied: whether the output's matrix is that of the embeddings.
        seed: of the random table.

    Raises:
        InputError: for an unknown form, or where a fixed text is missing or too short.

    Example:
        >>> model = MixedDecoder(27, layout("even", "nonapprox", 2), dim=12, heads=2)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 27])

    Source:
        Xue et al. 2025, arXiv 2510.11602; the host is like Qwen2, without grouped keys and biases.

    Note:
        That the fixed streams pass through all blocks, those of other forms included, that the random table is not trained, and
        that queries and keys of static forms are turned by positions and read behind the block's norm, is inferred.
    """

    table: Tensor | None
    fixed: Tensor | None

    def __init__(
        self,
        vocabulary: int,
        variants: Sequence[Variant],
        *,
        dim: int,
        heads: int,
        inner: int | None = None,
        longest: int = 2048,
        text: Int[Tensor, "tokens"] | None = None,
        taylor: Taylor = "joint",
        spread: float = 0.02,
        tied: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, layers=len(variants), longest=longest)
        for variant in variants:
            require_one_of(VARIANTS, variants=variant)
        inner = 4 * dim if inner is None else inner
        self.variants, self.longest = tuple(variants), longest
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList([DecoderBlock(dim, heads, inner, v, taylor) for v in variants])
        self.norm = nn.RMSNorm(dim, EPS)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight
        drawn = torch.randn(longest, dim, generator=torch.Generator().manual_seed(seed)) * spread
        self.register_buffer("table", drawn if "rndembqk" in variants else None)
        if "fixedseqqk" in variants:
            if text is None or len(text) < longest:
                came = "none" if text is None else f"{len(text)}"
                raise InputError(f"text: 'fixedseqqk' reads a fixed text of longest = {longest} tokens, got {came}")
            text = text[:longest].clone()
        else:
            text = None
        self.register_buffer("fixed", text)

    @classmethod
    def of_size(cls, size: str, vocabulary: int, name: Layout, variant: Variant, **settings: Any) -> MixedDecoder:
        """A model of a published size: `"70M"`, `"160M"`, `"500M"` or `"1.7B"`.

        Args:
            size: by name.
            vocabulary: number of tokens.
            name, variant: as of `layout`.
            settings: of the model.
        """
        require_one_of(SIZES, size=size)
        dim, layers, heads, inner = SIZES[size]
        return cls(vocabulary, layout(name, variant, layers), dim=dim, heads=heads, inner=inner, **settings)

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        """Logits of what comes behind each token."""
        return self.read(tokens, self.streams(tokens.shape[1]), None)[0]

    def read(
        self,
        tokens: Int[Tensor, "batch tokens"],
        streams: Mapping[str, Sequence[Tensor]],
        states: Sequence[Any] | None,
        start: int = 0,
    ) -> tuple[Float[Tensor, "batch tokens vocabulary"], list[Any]]:
        """Logits, and the states of all forms behind the last token.

        Args:
            tokens: those that come now.
            streams: the fixed streams, from `streams`, long enough.
            states: of an earlier call, None at the beginning.
            start: how many tokens came before.
        """
        end = start + tokens.shape[1]
        self._require_streams(end)
        h = e = self.embedding(tokens)
        positions = torch.arange(start, end, device=tokens.device).unsqueeze(0)
        new = []
        for i, block in enumerate(self.blocks):
            variant = self.variants[i]
            asks = e if variant == "staticembqk" else streams[variant][i][:, start:end] if variant in SIDE else None
            h, state = block(h, asks, positions, None if states is None else states[i])
            new.append(state)
        return self.head(self.norm(h)), new

    def streams(self, tokens: int) -> dict[str, list[Float[Tensor, "1 tokens dim"]]]:
        """What enters each block of the streams that are the same for all inputs, by form."""
        self._require_streams(tokens)
        found: dict[str, list[Tensor]] = {}
        positions = torch.arange(tokens, device=self.embedding.weight.device).unsqueeze(0)
        for kind in SIDE:
            if kind not in self.variants:
                continue
            if self.table is not None and kind == "rndembqk":
                x = self.table[:tokens].unsqueeze(0)
            else:
                assert self.fixed is not None
                x = self.embedding(self.fixed[:tokens]).unsqueeze(0)
            entering = []
            last = max(i for i, variant in enumerate(self.variants) if variant == kind)
            for block in self.blocks[: last + 1]:
                entering.append(x)
                x, _ = block(x, None, positions)
            found[kind] = entering
        return found

    def maps(self, tokens: Int[Tensor, "batch tokens"]) -> list[Float[Tensor, "batch heads tokens tokens"] | None]:
        """The attention maps of each layer; None for forms without one."""
        streams = self.streams(tokens.shape[1])
        h = e = self.embedding(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        found: list[Tensor | None] = []
        for i, block in enumerate(self.blocks):
            variant = self.variants[i]
            asks = e if variant == "staticembqk" else streams[variant][i] if variant in SIDE else None
            assert isinstance(block, DecoderBlock)
            form, source = block.form, block.norm1(h if asks is None else asks)
            if isinstance(form, DotProductForm):
                found.append(form.maps(source, positions).expand(len(tokens), -1, -1, -1))
            else:
                found.append(form.weights_of(source))
            h, _ = block(h, asks, positions)
        return found

    def _require_streams(self, tokens: int) -> None:
        if tokens > self.longest and any(variant in SIDE for variant in self.variants):
            raise InputError(f"tokens: the fixed streams have {self.longest} positions, and {tokens} tokens were given")


class MixedDecoding:
    """A text that a `MixedDecoder` reads piece by piece; the logits are those of reading it whole.

    Every form keeps what it needs: keys and values, running sums, a running mean; fixed streams are computed once.

    Args:
        model: in eval mode.
        longest: number of tokens that are read at most.

    Example:
        >>> decoding = MixedDecoding(MixedDecoder(9, ("nonapprox",), dim=4, heads=2).eval(), 8)
        >>> decoding.step(torch.tensor([[3, 1]])).shape, decoding.read
        (torch.Size([1, 2, 9]), 2)
    """

    @torch.no_grad()
    def __init__(self, model: MixedDecoder, longest: int) -> None:
        if model.training:
            raise InputError("model: expected one in eval mode, got one in training; call model.eval()")
        require_at_least(1, longest=longest)
        self.model, self.longest, self.read = model, longest, 0
        self._streams = model.streams(min(longest, model.longest))
        self._states: list[Any] | None = None

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch new vocabulary"]:
        """Read some more tokens of each text; gives the logits of what comes behind each."""
        if self.read + tokens.shape[1] > self.longest:
            raise InputError(f"tokens: more than longest = {self.longest}; {self.read} were read before")
        logits, self._states = self.model.read(tokens, self._streams, self._states, self.read)
        self.read += tokens.shape[1]
        return logits


def without_layers(model: MixedDecoder, layers: Collection[int]) -> MixedDecoder:
    """The same model with some of its blocks deleted, weights shared: whether a layer is needed.

    Args:
        model: trained; left as it is.
        layers: numbers from 0; those of even number are the odd ones counted from 1.

    Raises:
        InputError: for a layer that there is not, or where none would be left.
    """
    there = range(len(model.blocks))
    if not set(layers) <= set(there) or len(set(layers)) == len(there):
        raise InputError(f"layers: expected some of 0 to {len(there) - 1}, and not all, got {sorted(layers)}")
    kept = [i for i in there if i not in layers]
    shorter = copy.copy(model)
    shorter._modules = dict(model._modules)
    shorter.blocks = nn.ModuleList([model.blocks[i] for i in kept])
    shorter.variants = tuple(model.variants[i] for i in kept)
    return shorter


def train_decoder(
    model: MixedDecoder,
    text: Int[Tensor, "tokens"],
    *,
    steps: int,
    batch: int = 256,
    length: int = 2048,
    learning_rate: float = 4e-4,
    warm_up: int = 2000,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Train by AdamW, the rate rising in a line and falling along half a cosine; gradients pass through fixed streams too.

    Args:
        model: trained in place, left in eval mode.
        text: tokens; pieces begin anywhere.
        steps, batch, length: of the pieces. Published: 256 of 2,048 tokens, 15 billion tokens in all.
        learning_rate: the largest; 3e-4 for the largest model.
        warm_up: steps in which it rises.
        weight_decay: of matrices.
        clip: largest norm of the gradient.
        seed: of the pieces.

    Returns:
        The loss of each step, in nats per token.

    Source:
        Xue et al. 2025, arXiv 2510.11602, appendix.
    """
    require_at_least(1, steps=steps, batch=batch, length=length)
    if len(text) < length + 1:
        raise InputError(f"text: expected more than length = {length} tokens, got {len(text)}")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    stepper = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.9999), eps=1e-8)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, factor)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with in_training(model):
        for _ in range(steps):
            start = torch.randint(len(text) - length, (batch, 1), generator=generator)
            piece = text[start + torch.arange(length + 1)]
            loss = F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten())
            stepper.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            stepper.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses


def _form(variant: Variant, dim: int, heads: int, taylor: Taylor) -> CausalForm:
    if variant == "mlp":
        return GatedMLPForm(dim, heads)
    if variant == "approx":
        return TaylorForm(dim, heads, taylor=taylor)
    if variant == "nonapprox":
        return RunningForm(dim, heads)
    return SilentForm(dim, heads) if variant == "silent" else DotProductForm(dim, heads)
