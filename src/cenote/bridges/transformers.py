"""A transformers model with any cenote pool on top: one module that trains, saves and loads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from cenote.catalog import method
from cenote.core import InputError, files
from cenote.models.sources import require_own_files
from cenote.pool.fitting import FittedPool, Known, form_of, named_pool, warn_of_slots, width
from cenote.pool.layers.base import stack_layers

FORMAT = 2
FIELDS: dict[str, Any] = {
    "format": int,
    "method": str,
    "settings": dict,
    "prefix_tokens": int,
    "outputs": (int, type(None)),
}
"""What `pooled.json` must say to build the pool again."""
CARD, STATE, BACKBONE = "pooled.json", "pooled.safetensors", "backbone"


class PooledModel(nn.Module):
    """`y = pool(h_1 ... h_N)`, with `h` the last hidden states of a transformers model (of a layer pool: all of them).

    Args:
        backbone: a transformers model that gives `last_hidden_state`.
        pool: name of a pool as in `cenote list`, built for the backbone's width, or a pool.
        prefix_tokens: leading tokens ([CLS], registers) that a pool made for patches alone does not see. 0 shows it every
            token, which is what poolings of text do.
        outputs: width of a linear layer on the pooled vector, which gives `logits`; `None`: no such layer.
        settings: of a pool that is named.

    Raises:
        InputError: naming the argument, what came and what was expected.

    ```python
    from transformers import AutoModel

    model = PooledModel(AutoModel.from_pretrained("answerdotai/ModernBERT-base"), "simpool", outputs=2)
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    ```
    """

    def __init__(
        self,
        backbone: nn.Module,
        pool: str | nn.Module = "mean",
        prefix_tokens: int = 0,
        outputs: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        _transformers()
        config: Any = getattr(backbone, "config", None)
        dim = width_of(config)
        if prefix_tokens < 0:
            raise InputError(f"prefix_tokens: expected 0 or more leading tokens, got {prefix_tokens}")
        self.backbone = backbone
        self.method = pool if isinstance(pool, str) else None
        self.settings = settings
        if isinstance(pool, str):
            known = Known(dim, prefix_tokens, layers=getattr(config, "num_hidden_layers", None))
            self.pool: Any = named_pool(pool, known, settings)
        elif settings:
            raise InputError(
                f"{', '.join(settings)}: settings are of a pool that is named; give them to the pool itself"
            )
        else:
            self.pool = pool
        if getattr(self.pool, "dim", dim) != dim:
            raise InputError(f"pool: is made for tokens of width {self.pool.dim}, and the backbone gives {dim}")
        self.prefix_tokens = prefix_tokens
        self.head = None if outputs is None else nn.Linear(width(self.pool), outputs)

    @property
    def config(self) -> Any:
        """The backbone's."""
        return self.backbone.config

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding."""
        return width(self.pool)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the backbone and pool.

        Args:
            input_ids, token_type_ids, pixel_values, input_values, input_features, inputs: of the backbone. The usual ones have
                names here because `Trainer` hands over only columns that are named.
            attention_mask: of the backbone; also says which tokens are real.
            labels: with `outputs`, what the loss is computed on: whole numbers (cross-entropy), or floats (mean squared error).

        Returns:
            `PooledOutput(loss, logits, embedding, weights)`, a transformers `ModelOutput`; what there is not is `None`.
        """
        layered = form_of(self.pool) == "layers"
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
        }
        inputs |= {k: v for k, v in named.items() if v is not None} | {"return_dict": True}
        hidden = self.backbone(**inputs, **({"output_hidden_states": True} if layered else {}))
        x = stack_layers(hidden.hidden_states) if layered else hidden.last_hidden_state
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != (x.shape[0], x.shape[-2]) or (x.dim() == 4 and not layered):
            mask = None
        fitted = FittedPool(self.pool, self.prefix_tokens)
        output, weights = fitted.attend(x, None if mask is None else mask.bool())
        embedding = output.flatten(1)
        logits = None if self.head is None else self.head(embedding)
        return _output_class()(loss=_loss(logits, labels), logits=logits, embedding=embedding, weights=weights)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the backbone in its own format and the pool as safetensors beside it; `from_pretrained` reads both.

        Raises:
            InputError: where the pool was not given by its name, which is how it is built again.
        """
        if self.method is None:
            raise InputError(
                "pool: was given as a module; name it as in cenote list to save it, or save its state_dict"
            )
        folder = Path(folder)
        backbone: Any = self.backbone
        backbone.save_pretrained(folder / BACKBONE)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}
        card = {
            "format": FORMAT,
            "method": self.method,
            "settings": self.settings,
            "prefix_tokens": self.prefix_tokens,
            "outputs": None if self.head is None else self.head.out_features,
        }
        files.write_saved(folder / CARD, folder / STATE, card, state)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **of_backbone: Any) -> PooledModel:
        """Read what `save_pretrained` wrote.

        Args:
            folder: with the three parts.
            of_backbone: arguments of `AutoModel.from_pretrained`; weights come from safetensors unless they say otherwise.

        What was saved in format 1 gives what it gave, with one exception, of which a warning tells: pools that cut a sequence
        into segments counted masked slots then.

        Raises:
            InputError: naming the folder and what is wrong with it.
        """
        folder = Path(folder)
        try:
            card, state = files.read_saved(folder / CARD, folder / STATE, "save the model again", **FIELDS)
        except OSError as error:
            raise InputError(f"{folder}: holds no model of PooledModel.save_pretrained ({error})") from error
        files.require_format(folder, card, 1, FORMAT)
        if card["format"] == 1:
            card = _as_in_format_1(folder, card)
        transformers = _transformers()
        try:
            require_own_files(folder / BACKBONE, pickles=of_backbone.get("use_safetensors") is False)
            of_backbone = {"use_safetensors": True, **of_backbone}
            backbone = transformers.AutoModel.from_pretrained(folder / BACKBONE, **of_backbone)
            model = cls(backbone, card["method"], card["prefix_tokens"], card["outputs"], **card["settings"])
            missing, unexpected = model.load_state_dict(state, strict=False)
        except InputError:
            raise
        except (AttributeError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            said = " ".join(str(error).split())
            raise InputError(f"{folder}: the model cannot be built again ({said}); save the model again") from error
        wrong = [*(k for k in missing if not k.startswith("backbone.")), *unexpected]
        if wrong:
            raise InputError(f"{folder}: {STATE} does not fit {CARD} ({', '.join(wrong)}); save the model again")
        return model.eval()


def _as_in_format_1(folder: Path, card: dict[str, Any]) -> dict[str, Any]:
    """The card of format 2 with which a model of format 1 gives what it gave; a warning where nothing can.

    Format 1 showed layer pools the prefix tokens, did not tell pools how many there are, and let masked slots take places in
    pools to which order matters.
    """
    entry = method(card["method"])
    told = inspect.signature(entry.load()).parameters.get("prefix_tokens")
    warn_of_slots(entry.name, str(folder))
    if entry.kind == "layers":
        return {**card, "prefix_tokens": 0}
    return card if told is None else {**card, "prefix_tokens": told.default}


def width_of(config: Any) -> int:
    """Width of the hidden states of a transformers model.

    Raises:
        InputError: where its config does not say.
    """
    for name in ("hidden_size", "d_model", "n_embd"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    sizes = getattr(config, "hidden_sizes", None)
    if sizes:
        return int(sizes[-1])
    raise InputError("backbone: its config does not say how wide its hidden states are; give a transformers model")


def _loss(logits: Tensor | None, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    if logits is None:
        raise InputError("labels: came without a layer that predicts them; build PooledModel with outputs=...")
    if labels.is_floating_point():
        return F.mse_loss(logits, labels.view_as(logits))
    return F.cross_entropy(logits, labels)


@cache
def _output_class() -> Any:
    from transformers.utils.generic import ModelOutput

    @dataclass
    class PooledOutput(ModelOutput):
        """What a `PooledModel` gives; see its `forward`."""

        loss: Any = None
        logits: Any = None
        embedding: Any = None
        weights: Any = None

    return PooledOutput


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("transformers is not installed; install it with: pip install 'cenote[models]'") from error
    return transformers
