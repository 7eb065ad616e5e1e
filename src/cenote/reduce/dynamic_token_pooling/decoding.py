"""Character by character: the layers on segments run only where one is over.

Source: Nawrot et al. (2023), arXiv 2211.09761; how it decodes is not told there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.reduce.dynamic_token_pooling.model import HourglassLM
from cenote.reduce.dynamic_token_pooling.relative_attention import Past
from cenote.reduce.dynamic_token_pooling.shortening import EPS


class HourglassDecoding:
    """A text that an `HourglassLM` reads token by token; the logits are those of reading it whole.

    Args:
        model: in eval mode, causal.
        batch: how many texts of one length.

    Attributes:
        read: how many tokens so far.
        shortened: how often the layers on segments have run on an item, the null group included.

    Example:
        >>> model = HourglassLM(27, (1, 1, 1), dim=16, heads=2, inner=32, boundaries="whitespace").eval()
        >>> decoding = HourglassDecoding(model)
        >>> decoding.step(torch.tensor([3])).shape, decoding.shortened
        (torch.Size([1, 27]), 1)
    """

    @torch.no_grad()
    def __init__(self, model: HourglassLM, batch: int = 1) -> None:
        require_at_least(1, batch=batch)
        if model.training:
            raise InputError("model: expected one in eval mode, got one in training; call model.eval()")
        if model.bidirectional:
            raise InputError(
                "model: reads what comes later, so it cannot go on with a text; expected bidirectional=False"
            )
        self.model, self.read, self.shortened = model, 0, 0
        like = model.output.weight
        heads, width = model.content_bias.shape
        self.pasts = [[Past(batch, heads, width, like) for _ in model.layers_of(stack)] for stack in range(3)]
        self.everyone = torch.arange(batch, device=like.device)
        self.total = like.new_zeros(batch, like.shape[1])
        self.count = like.new_zeros(batch, 1)
        self.current = self.total.clone()
        if model.null_group is not None:
            self._shorten(model.null_group[0].expand(batch, -1), self.everyone)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "batch"]) -> Float[Tensor, "batch vocabulary"]:
        """Read one more token of each text; gives the logits of the next."""
        if tokens.shape != self.everyone.shape:
            raise InputError(f"tokens: expected one of each of {len(self.everyone)} texts, got {list(tokens.shape)}")
        model = self.model
        h = self._run(0, model.embedding(tokens), self.everyone)
        if model.null_group is None:
            h = self._run(1, h, self.everyone)
        else:
            self.total, self.count = self.total + h, self.count + 1
            over = model.ends(tokens, h, self.read).nonzero()[:, 0]
            if len(over):
                self._shorten(self.total[over] / (self.count[over] + EPS), over)
                self.total[over], self.count[over] = 0.0, 0.0
            h = h + self.current / (1 + EPS)
        self.read += 1
        return model.output(self._run(2, h, self.everyone))

    def _shorten(self, segment: Float[Tensor, "some dim"], items: Int[Tensor, "some"]) -> None:
        assert self.model.short_norm is not None
        self.current[items] = self._run(1, self.model.short_norm(segment), items)
        self.shortened += len(items)

    def _run(self, stack: int, x: Float[Tensor, "some dim"], items: Int[Tensor, "some"]) -> Float[Tensor, "some dim"]:
        model = self.model
        for layer, past in zip(model.layers_of(stack), self.pasts[stack], strict=True):
            x = layer.step(x, model.content_bias, model.distance_bias, past, items)
        return x


def generate_text(
    model: HourglassLM,
    prompt: Int[Tensor, "batch tokens"],
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch steps"]:
    """Go on with texts of one length.

    Args:
        model: in eval mode.
        prompt: at least one token each.
        steps: how many tokens are written.
        temperature: 0: always the likeliest token.
        generator: of what is drawn.
    """
    require_at_least(0, steps=steps, temperature=temperature)
    if prompt.dim() != 2 or not prompt.shape[1]:
        raise InputError(f"prompt: expected [batch, tokens] with at least one token, got {list(prompt.shape)}")
    decoding, written = HourglassDecoding(model, len(prompt)), []
    for tokens in prompt.unbind(1):
        logits = decoding.step(tokens)
    for _ in range(steps):
        if temperature:
            tokens = (logits / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]
        else:
            tokens = logits.argmax(-1)
        written.append(tokens)
        logits = decoding.step(tokens)
    return torch.stack(written, 1) if written else prompt[:, :0]
