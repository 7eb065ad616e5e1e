"""Where the probes looked: attention samples for the report, and how well they find labelled tokens."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import cenote.core.files as files
from cenote.features.dataset import TokenDataset
from cenote.features.raw import UnreadableError
from cenote.features.store import StoredPictures
from cenote.jobs.probe.module import Probe
from cenote.jobs.probe.result import Comparison

SAMPLES = 12
TOKENS_SHOWN = 1024


def save_looks(
    folder: Path,
    comparison: Comparison,
    data: TokenDataset,
    probes: dict[str, Probe],
    views: dict[str, TokenDataset] | None = None,
) -> Comparison:
    """Write `attention.json` and `attention.safetensors`; add the localisation scores to the comparison.

    Samples are test items, spread over the classes in the order of the data: nothing is picked by its result. `views` are the
    data as each probe reads them, where probes read different layers.
    """
    items = _sampled(data)
    views = dict.fromkeys(probes, data) if views is None else views
    tensors: dict[str, Tensor] = {}
    predictions: list[dict[str, str]] = [{} for _ in items]
    for name, probe in probes.items():
        for i, item in enumerate(items):
            weights, logits = _look(probe, views[name], item)
            predictions[i][name] = _worded(logits, data)
            if weights is not None:
                shown = weights if data.grid is not None else weights[:, :TOKENS_SHOWN]
                tensors[f"{name}/{i}"] = shown.contiguous()
    card = {
        "items": [
            {
                "id": data.ids[item],
                "label": _label(data, item),
                "tokens": int(data.lengths()[item]) - data.prefix_tokens,
                **_picture(data, item),
                **_words(data, item),
                "predictions": predictions[i],
            }
            for i, item in enumerate(items)
        ],
        "grid": None if data.grid is None else list(data.grid),
        "prefix_tokens": data.prefix_tokens,
        "methods": [r.method for r in comparison.results if r.method in probes],
        "token_labels": None if data.token_labels is None else [data.labels_of(i).tolist() for i in items],
    }
    files.write_saved(folder / "attention.json", folder / "attention.safetensors", card, tensors)
    if data.token_labels is None:
        return comparison
    return dataclasses.replace(comparison, localisation=localisation(data, probes, views))


def localisation(
    data: TokenDataset, probes: dict[str, Probe], views: dict[str, TokenDataset] | None = None
) -> dict[str, float]:
    """Per method the mean, over test items that hold labelled and unlabelled tokens, of the AUROC of its weights."""
    from sklearn.metrics import roc_auc_score

    found: dict[str, float] = {}
    labels = {i: data.labels_of(i)[data.prefix_tokens :].bool() for i in data.indices("test").tolist()}
    mixed = [i for i, marked in labels.items() if bool(marked.any()) and not bool(marked.all())]
    for name, probe in probes.items():
        scores = []
        for item in mixed:
            weights, _ = _look(probe, data if views is None else views[name], item)
            if weights is not None:
                scores.append(roc_auc_score(labels[item].numpy(), weights.mean(0).numpy()))
        if scores:
            found[name] = float(np.mean(scores))
    return found


@torch.no_grad()
def _look(probe: Probe, data: TokenDataset, item: int) -> tuple[Float[Tensor, "heads patches"] | None, Tensor]:
    x = data.copies(item)
    logits = probe(x).squeeze(0)
    weights = probe.attend(x).weights
    if weights is None:
        return None, logits
    # of a set [1, heads, tokens], of a graph [heads, nodes]
    return weights.flatten(0, -2)[:, data.prefix_tokens - probe.drop :].float(), logits


def _sampled(data: TokenDataset) -> list[int]:
    test = data.indices("test").tolist()
    if data.task not in ("binary", "multiclass"):
        return test[:SAMPLES]
    by_class: dict[int, list[int]] = {}
    for i in test:
        by_class.setdefault(int(data.y[i]), []).append(i)
    rounds = [i for rank in range(SAMPLES) for c in sorted(by_class) for i in by_class[c][rank : rank + 1]]
    return rounds[:SAMPLES]


def _label(data: TokenDataset, item: int) -> str:
    y = data.y[item]
    if data.task in ("binary", "multiclass"):
        return data.classes[int(y)]
    if data.task == "multilabel":
        return ", ".join(c for c, on in zip(data.classes, y.tolist(), strict=True) if on) or "none"
    return ", ".join(f"{v:.3g}" for v in y.tolist())


def _worded(logits: Tensor, data: TokenDataset) -> str:
    if data.task == "binary":
        return data.classes[int(logits[0] > 0)]
    if data.task == "multiclass":
        return data.classes[int(logits.argmax())]
    if data.task == "multilabel":
        return ", ".join(c for c, v in zip(data.classes, logits.tolist(), strict=True) if v > 0) or "none"
    return ", ".join(f"{v:.3g}" for v in logits.tolist())


def _picture(data: TokenDataset, item: int) -> dict[str, Any]:
    """The picture that the tokens came from, or why it is not shown."""
    try:
        # of a feature store, the file of an item may be gone, or be another one now
        if isinstance(data.images, StoredPictures):
            return {"image": _png(data.images.shown(item))}
    except UnreadableError as error:
        return {"image": None, "unpictured": str(error)}
    image = None if data.images is None else data.images[item]
    return {"image": None if image is None else _png(image)}


def _words(data: TokenDataset, item: int) -> dict[str, Any]:
    """What the tokens stand for, or why that is not known."""
    if data.words is None:
        return {}
    try:
        return {"words": list(data.words[item][data.prefix_tokens :])}
    except UnreadableError as error:
        return {"unread": str(error)}


def _png(image: Any) -> str:
    import matplotlib.image

    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image, format="png", cmap="gray", vmin=0, vmax=255)
    return base64.b64encode(buffer.getvalue()).decode()
