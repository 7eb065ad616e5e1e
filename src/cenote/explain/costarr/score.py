"""The two-sided score of COSTARR.

Source: Rabinowitz, Cruz, Scheirer and Boult, "COSTARR: Consolidated Open Set Technique with Attenuation for Robust Recognition"
(2025), arXiv 2508.01087.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cenote.core import InputError, files
from cenote.core.requirements import require_one_of

Combine = Literal["mean", "concat"]
Halves = Literal["both", "pre", "post"]
Scale = Literal["min-max", "z-score"]
Pick = Literal["argmax", "max"]

FORMAT = 1
UNKNOWN = -1


class Costarr:
    """How likely an input is of a known class: like its class's mean before the last layer's weights, and behind them.

    `z_k = W_k . f + b_k`, `m = argmax z`, `h_k = f o W_k`; `C_k = (cos(f, mu^F_k) + cos(h_k, mu^H_k)) / 2`;
    `S = lambda C_m`, `lambda` the largest logit between the smallest and the largest of the training set. `mu^F` are
    means of correctly classified training features, and `mu^H_k = mu^F_k o W_k`: nothing is trained. Manners are those
    of scikit-learn's detectors of outliers: larger scores are more normal, -1 is unknown.

    Args:
        weight, bias: of the classifier's last layer, `[classes, dim]` and `[classes]`.
        halves: `"both"`, or one: `"pre"` (features), `"post"` (features times weights).
        combine: `"mean"` of both cosines, or `"concat"`: the cosine of `[f; h]` with `[mu^F; mu^H]`.
        scale: `"min-max"` as above, `"z-score"`: of the logit among those of its sample; `None`: `lambda = 1`.
        pick: the predicted class, or `"max"`: the largest `lambda_k C_k` of any.
        only_correct: whether only training samples count that are classified correctly.
        accept: share of known samples that `calibrate` lets pass.
        names: of the classes, for warnings.

    Example:
        >>> weight, features = torch.eye(2), torch.tensor([[2.0, 0.0], [3.0, 0.1], [0.0, 2.0]])
        >>> found = Costarr(weight, scale=None).fit(features, torch.tensor([0, 0, 1])).calibrate(features)
        >>> found.predict(torch.tensor([[2.5, 0.05], [0.1, -0.2]])).tolist()
        [0, -1]

    Note:
        The authors' code could not be had. That only correct samples count, and the min-max scale, are inferred.

    Source: Rabinowitz, Cruz, Scheirer and Boult (2025), arXiv 2508.01087.
    """

    def __init__(
        self,
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, "classes"] | None = None,
        *,
        halves: Halves = "both",
        combine: Combine = "mean",
        scale: Scale | None = "min-max",
        pick: Pick = "argmax",
        only_correct: bool = True,
        accept: float = 0.95,
        names: Sequence[str] | None = None,
    ) -> None:
        require_one_of(get_args(Halves), halves=halves)
        require_one_of(get_args(Combine), combine=combine)
        require_one_of((*get_args(Scale), None), scale=scale)
        require_one_of(get_args(Pick), pick=pick)
        if not 0 < accept <= 1:
            raise InputError(f"accept: expected a share above 0, up to 1, got {accept}")
        classes = len(weight)
        if names is not None and len(names) != classes:
            raise InputError(f"names: expected {classes} as the rows of weight, got {len(names)}")
        self.weight = weight
        self.bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        self.halves, self.combine, self.scale, self.pick = halves, combine, scale, pick
        self.only_correct, self.accept = only_correct, accept
        self.names = [str(n) for n in (names or range(classes))]
        self.threshold: float | None = None
        self._forget()

    def _forget(self) -> None:
        self.sums = torch.zeros_like(self.weight, dtype=torch.float64)
        self.counts = torch.zeros(len(self.weight), dtype=torch.long, device=self.weight.device)
        self.range = (float("inf"), float("-inf"))

    def fit(self, features: Float[Tensor, "items dim"], labels: Int[Tensor, "items"]) -> Self:
        """The means of the classes, and the range of the largest logit.

        Warns:
            UserWarning: naming classes without a sample that counts; their cosines are 0.
        """
        self._forget()
        self.partial_fit(features, labels)
        self.check_classes()
        return self

    def partial_fit(self, features: Float[Tensor, "items dim"], labels: Int[Tensor, "items"]) -> Self:
        """The same from one part of the samples after the other."""
        logits = self.logits(features)
        classes = len(self.weight)
        if len(labels) != len(features) or bool(((labels < 0) | (labels >= classes)).any()):
            raise InputError(f"labels: expected {len(features)} numbers of classes from 0 to {classes - 1}")
        largest, predicted = logits.max(1)
        self.range = (min(self.range[0], float(largest.min())), max(self.range[1], float(largest.max())))
        chosen = predicted == labels if self.only_correct else torch.ones_like(labels, dtype=torch.bool)
        self.sums.index_add_(0, labels[chosen], features[chosen].double())
        self.counts += torch.bincount(labels[chosen], minlength=classes)
        return self

    def check_classes(self) -> None:
        """Warn of classes without a training sample that counts, by their names."""
        missing = [self.names[k] for k, n in enumerate(self.counts.tolist()) if n == 0]
        if missing:
            which = "correctly classified " if self.only_correct else ""
            warnings.warn(
                f"classes without a {which}training sample: {', '.join(missing)}; what is taken for one scores 0",
                UserWarning,
                stacklevel=3,
            )

    @property
    def means(self) -> Float[Tensor, "classes dim"]:
        """`mu^F`; zeros for a class without samples. `mu^H` is this times the weights."""
        return (self.sums / self.counts.clamp(min=1)[:, None]).to(self.weight)

    def logits(self, features: Float[Tensor, "items dim"]) -> Float[Tensor, "items classes"]:
        """`W f + b`."""
        if features.shape[1] != self.weight.shape[1]:
            raise InputError(f"features: expected {self.weight.shape[1]} channels as weight, got {features.shape[1]}")
        return features @ self.weight.T + self.bias

    def score_samples(self, features: Float[Tensor, "items dim"]) -> Float[Tensor, "items"]:
        """S; larger = more likely of a known class."""
        return self._scored(features)[0]

    def calibrate(self, features: Float[Tensor, "items dim"]) -> Self:
        """Set the threshold so that the share `accept` of these known samples, best held out, passes."""
        if not len(features):
            raise InputError("features: expected at least one known sample")
        ranked = self.score_samples(features).sort().values
        self.threshold = float(ranked[int((1 - self.accept) * len(ranked))])
        return self

    def predict(self, features: Float[Tensor, "items dim"]) -> Int[Tensor, "items"]:
        """The class of each sample, -1 where it is of none that is known."""
        if self.threshold is None:
            raise InputError("threshold: is not set; call calibrate with known samples before")
        scores, classes = self._scored(features)
        return classes.masked_fill(scores < self.threshold, UNKNOWN)

    def _scored(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if not bool(self.counts.any()) and self.range[1] == float("-inf"):
            raise InputError("means: are not there; call fit before")
        logits = self.logits(features)
        scales = self._scales(logits)
        if self.pick == "max":
            classes = torch.arange(len(self.weight), device=logits.device)
            each = torch.stack([self._cosines(features, k.expand(len(features))) for k in classes], 1)
            best, chosen = (scales * each).max(1)
            return best, chosen
        predicted = logits.argmax(1)
        scale = scales.gather(1, predicted[:, None])[:, 0]
        return scale * self._cosines(features, predicted), predicted

    def _cosines(self, f: Tensor, classes: Tensor) -> Tensor:
        mean = self.means[classes]
        h, mean_h = self._behind(f, classes), self._behind(mean, classes)
        if self.halves == "pre":
            return cosine_similarity(f, mean, dim=1)
        if self.halves == "post":
            return cosine_similarity(h, mean_h, dim=1)
        if self.combine == "concat":
            return cosine_similarity(torch.cat([f, h], 1), torch.cat([mean, mean_h], 1), dim=1)
        return (cosine_similarity(f, mean, dim=1) + cosine_similarity(h, mean_h, dim=1)) / 2

    def _behind(self, f: Tensor, classes: Tensor) -> Tensor:
        """Features, or means of them, behind the last layer's weights."""
        return f * self.weight[classes]

    def _scales(self, logits: Tensor) -> Tensor:
        if self.scale is None:
            return torch.ones_like(logits)
        if self.scale == "z-score":
            deviation = logits.std(1, keepdim=True, correction=0)
            return (logits - logits.mean(1, keepdim=True)) / deviation.masked_fill(deviation == 0, 1.0)
        least, most = self.range
        if most <= least:
            return (logits >= most).to(logits)
        return ((logits - least) / (most - least)).clamp(0, 1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {"weight": self.weight, "bias": self.bias, "sums": self.sums, "counts": self.counts}
        options = ("halves", "combine", "scale", "pick", "only_correct", "accept", "names", "threshold", "range")
        card = {"format": FORMAT, **{name: getattr(self, name) for name in options}}
        files.write_tensors(Path(path), tensors, {"costarr": json.dumps(card)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        try:
            stored = files.read_tensors(Path(path))
            card: dict[str, Any] = json.loads(stored.metadata["costarr"])
            tensors = {name: stored.tensors[name] for name in ("weight", "bias", "sums", "counts")}
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except Exception as error:
            raise InputError(f"{path}: holds no such score ({error})") from None
        files.require_format(Path(path), card, FORMAT)
        options = ("halves", "combine", "scale", "pick", "only_correct", "accept", "names")
        found = cls(tensors["weight"], tensors["bias"], **{name: card[name] for name in options})
        found.sums, found.counts = tensors["sums"], tensors["counts"]
        found.threshold, found.range = card["threshold"], (card["range"][0], card["range"][1])
        return found
