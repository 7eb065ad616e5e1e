from typing import Literal

from torch import nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.core.sets import PaddedTokens
from cenote.pool.attention.pma import PMA
from cenote.pool.attention.set_attention import ISAB, SAB, Variant
from cenote.pool.base import PaddedPool, Pooled


class SetTransformer(PaddedPool):
    """Two induced attention blocks, pooling by learned seeds, attention among the outputs, and a linear layer.

    `Z = ISAB(ISAB(x))`, `y = Linear(SAB(...SAB(PMA_k(Z))))`. The weights are those of the pooling, on the encoded tokens.

    Args:
        dim: width of a token.
        out_dim: width of an output vector; default `dim`.
        seeds: number `k` of output vectors.
        hidden: width inside.
        heads: divides `hidden`. Default 4, or the largest divisor below it.
        inducing: inducing points of each encoder block; `None`: the quadratic `SAB` instead.
        ln, variant, ff_before: see `MAB` and `PMA`.
        decoder_blocks: number of `SAB` after the pooling. `None`: 2, and none for a single output, which has no other to
            attend to (the authors' point cloud model).
        dropout: before and after the pooling; 0.5 in the authors' point cloud model.
        pooling: `"pma"`, or its rival `"mean"`: the mean of the encoded tokens, which the linear layer alone maps to outputs.

    Example:
        >>> SetTransformer(2, out_dim=5, seeds=4)(torch.randn(3, 50, 2)).shape
        torch.Size([3, 4, 5])

    Source: Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.

    Note:
        The authors' code has no masks; here padded tokens are neither attended to nor pooled.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        seeds: int = 1,
        hidden: int = 128,
        heads: int | None = None,
        inducing: int | None = 32,
        ln: bool = False,
        variant: Variant = "code",
        ff_before: bool = False,
        decoder_blocks: int | None = None,
        dropout: float = 0.0,
        pooling: Literal["pma", "mean"] = "pma",
    ) -> None:
        require_one_of(("pma", "mean"), pooling=pooling)
        super().__init__(dim, out_dim)
        self.vectors = seeds
        self.pairwise = inducing is None
        decoder_blocks = (2 if seeds > 1 and pooling == "pma" else 0) if decoder_blocks is None else decoder_blocks
        if pooling == "mean" and decoder_blocks:
            raise InputError(
                f"decoder_blocks: a mean is one vector with no other to attend to, got {decoder_blocks}; leave it out"
            )

        def encoder_block(width: int) -> nn.Module:
            if inducing is None:
                return SAB(width, hidden, heads, ln, variant)
            return ISAB(width, hidden, heads, inducing, ln, variant)

        self.enc = nn.ModuleList([encoder_block(dim), encoder_block(hidden)])
        self.dropout = nn.Dropout(dropout)
        self.pma = PMA(hidden, seeds, heads, ln, variant, ff_before) if pooling == "pma" else None
        self.dec = nn.ModuleList(SAB(hidden, hidden, heads, ln, variant) for _ in range(decoder_blocks))
        self.out = nn.Linear(hidden, self.out_dim if pooling == "pma" else seeds * self.out_dim)
        inert = [name for name, _ in self.named_parameters() if name.endswith("fc_k.bias")]
        if seeds == 1:  # attention to oneself alone has nothing to choose
            inert += [f"dec.{i}.mab.fc_k.weight" for i in range(decoder_blocks)]
        self.inert_parameters = tuple(inert)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        z = tokens.values
        for block in self.enc:
            z = block(z, tokens.mask)
        encoded = PaddedTokens(self.dropout(z), tokens.mask)
        if self.pma is None:
            y = self.out(self.dropout(encoded.mean()))
            return Pooled(y if self.vectors == 1 else y.unflatten(-1, (self.vectors, self.out_dim)), encoded.uniform())
        seeds, weights = self.pma.pool(encoded)
        y = self.dropout(seeds.unsqueeze(1) if self.vectors == 1 else seeds)
        for block in self.dec:
            y = block(y)
        y = self.out(y)
        return Pooled(y.squeeze(1) if self.vectors == 1 else y, weights)
