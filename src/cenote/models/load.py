"""`load`: the adapter of a model, chosen by what the model is."""

from __future__ import annotations

from typing import get_args

import torch

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.models.base import Backbone, Kind

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    kind: str | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    max_length: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Backbone:
    """A frozen model that gives tokens, hidden states and attentions.

    Args:
        name: a folder of a saved transformers, timm or sentence-transformers model, or a model's name on the hub.
        kind: image, audio or text; needed where a model takes several, as dual encoders do.
        revision: branch, tag or commit on the hub.
        device: to compute on.
        precision: to compute in: float32, bfloat16 or float16.
        max_length: texts are cut to so many tokens; default: the model's own limit.
        trust_remote_code: run Python code that lies with the model. Never without reading it.
        allow_pickle: also take weights from a pickle (read with `weights_only`).

    Raises:
        InputError: where there is no such model, or it cannot be used, saying why.
    """
    if kind is not None:
        require_one_of(get_args(Kind), kind=kind)
    require_one_of(PRECISIONS, precision=precision)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {device!r} cannot be used ({str(error).splitlines()[0]})") from error
    from cenote.models import hugging_face

    backbone = hugging_face.load(
        name,
        kind,  # type: ignore[arg-type]
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        precision=PRECISIONS[precision],
        max_length=max_length,
    )
    return backbone if device == "cpu" else backbone.to(device)
