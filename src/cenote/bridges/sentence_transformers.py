"""Any cenote pool as a module of sentence-transformers, and any reducer as a token pooling of its multi-vector encoders.

```python
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Transformer
from cenote.bridges.sentence_transformers import CenotePooling

model = SentenceTransformer(modules=[Transformer("sentence-transformers/all-MiniLM-L6-v2"), CenotePooling("simpool")])
```

```python
from sentence_transformers import MultiVectorEncoder
from cenote.bridges.sentence_transformers import PooledVectors

vectors = MultiVectorEncoder("lightonai/GTE-ModernColBERT-v1").encode_document(
    texts, token_pooling=PooledVectors("hierarchical", factor=4)
)
```
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cenote.core import Bags, InputError, Tokens, files
from cenote.core.masks import first_tokens, real_tokens
from cenote.core.requirements import require_at_least
from cenote.jobs.reduce.pooling import in_batches, reducer_of
from cenote.pool.fitting import FittedPool, Known, form_of, named_pool, warn_of_slots, width
from cenote.pool.layers.base import stack_layers

FIELDS: dict[str, Any] = {
    "method": str,
    "dim": int,
    "layers": (int, type(None)),
    "include_prompt": bool,
    "settings": dict,
}
"""What `config.json` must say to build the pool again."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEPT = ("prompts", "default_prompt_name", "truncate_dim", "similarity_fn_name")
"""What a model is told besides its modules."""


class CenotePooling(nn.Module):
    """A pool between a `Transformer` and what follows it; reads `token_embeddings`, writes `sentence_embedding`.

    Args:
        method: name of a pool of sets or of layers, as in `cenote list`. A pool of layers reads all hidden states, which the
            transformer is then told to give.
        dim: width of the token embeddings; default: asked of the model when it is put together (sentence-transformers 6 or
            newer; older versions need it here).
        layers: number of layers, likewise.
        include_prompt: False: tokens of the prompt are left out.
        prefix_tokens: leading tokens ([CLS]) that a pool made for patches alone does not see, nor a pool of layers that does
            not read [CLS]: as many as the probe was told whose winner this is. 0 shows every pool every token. They count as
            prefix even where a prompt that is left out begins with them.
        settings: of the pool.

    Raises:
        InputError: where there is no such pool or it cannot be built.

    Example:
        >>> pooling = CenotePooling("mean", dim=2)
        >>> features = {"token_embeddings": torch.tensor([[[1.0, 3.0], [3.0, 5.0], [9.0, 9.0]]]),
        ...             "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> pooling(features)["sentence_embedding"].tolist()
        [[2.0, 4.0]]

    Note:
        The pool sees every real token, [CLS] and [SEP] included, as sentence-transformers' own poolings do, unless it is told
        of prefix tokens. A saved model is loaded with `SentenceTransformer(folder, trust_remote_code=True)`: since version 6
        that is asked for every module of another package. Weights are kept as safetensors; nothing is unpickled.
    """

    def __init__(
        self,
        method: str = "mean",
        dim: int | None = None,
        layers: int | None = None,
        include_prompt: bool = True,
        prefix_tokens: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if prefix_tokens < 0:
            raise InputError(f"prefix_tokens: expected 0 or more leading tokens, got {prefix_tokens}")
        self.method = method
        self.dim = dim
        self.layers = layers
        self.include_prompt = include_prompt
        self.prefix_tokens = prefix_tokens
        self.settings = settings
        self.pool: nn.Module | None = None
        if dim is not None:
            self.pool = named_pool(method, Known(dim, prefix_tokens, layers=layers), settings)
        _become_module()

    def on_model_ready(self, model: Any) -> None:
        """Build the pool for the model that this module is now part of; called by sentence-transformers."""
        transformer = next((m for m in model if m is not self and hasattr(m, "get_embedding_dimension")), None)
        config = getattr(getattr(transformer, "auto_model", None), "config", None)
        if self.pool is None:
            if transformer is None:
                raise InputError(
                    "dim: no module before the pooling says how wide its tokens are; give CenotePooling dim="
                )
            self.dim = int(transformer.get_embedding_dimension())
            self.layers = self.layers or getattr(config, "num_hidden_layers", None)
            known = Known(self.dim, self.prefix_tokens, layers=self.layers)
            pool = self.pool = named_pool(self.method, known, self.settings)
            like = next(model.parameters(), torch.zeros(()))
            pool.to(like.device, like.dtype)
        if form_of(self.pool) == "layers" and config is not None:
            config.output_hidden_states = True

    def forward(self, features: MutableMapping[str, Any], **_: Any) -> MutableMapping[str, Any]:
        """Add `sentence_embedding` to the features."""
        fitted, x, mask = self._fitted(features)
        features["sentence_embedding"] = fitted.pooled(x, mask)
        return features

    def attend(self, features: Mapping[str, Any]) -> Any:
        """Output and weights of the pool: what each embedding took from each token."""
        fitted, x, mask = self._fitted(features)
        return fitted.attend(x, mask)

    def get_embedding_dimension(self) -> int:
        """Width of the sentence embedding."""
        return width(self._built())

    def get_sentence_embedding_dimension(self) -> int:
        """As `get_embedding_dimension`, for older versions of sentence-transformers."""
        return self.get_embedding_dimension()

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write `config.json` and `model.safetensors`, whatever format was asked for."""
        pool = self._built()
        card = {
            "method": self.method,
            "dim": self.dim,
            "layers": self.layers,
            "include_prompt": self.include_prompt,
            "prefix_tokens": self.prefix_tokens,
            "settings": self.settings,
        }
        files.write_saved(Path(output_path) / CONFIG, Path(output_path) / WEIGHTS, card, pool.state_dict())

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **hub: Any) -> CenotePooling:
        """Read what `save` wrote, from a folder or from the Hugging Face Hub.

        Raises:
            InputError: naming what cannot be read.
        """
        try:
            found = [_file(model_name_or_path, subfolder, name, hub) for name in (CONFIG, WEIGHTS)]
            card, state = files.read_saved(found[0], found[1], "save it again", **FIELDS)
            if "prefix_tokens" not in card:
                warn_of_slots(card["method"], model_name_or_path)
            # cards of before the argument hold it, if at all, among the settings of the pool
            settings = {"prefix_tokens": card.get("prefix_tokens", 0), **card["settings"]}
            pooling = cls(card["method"], card["dim"], card["layers"], card["include_prompt"], **settings)
            pooling._built().load_state_dict(state)
        except InputError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{model_name_or_path}: holds no whole CenotePooling ({error}); save it again") from error
        return pooling

    def extra_repr(self) -> str:
        return f"{self.method!r}, dim={self.dim}"

    def _built(self) -> nn.Module:
        if self.pool is None:
            raise InputError(
                f"dim: CenotePooling({self.method!r}) is part of no model yet, so the width of its tokens is not known; "
                f"give dim="
            )
        return self.pool

    def _fitted(self, features: Mapping[str, Any]) -> tuple[FittedPool, Tensor | Tokens, Tensor | None]:
        """The pool and its input: sets of tokens, or a stack of layers, and the mask of what is real and no prompt."""
        pool = self._built()
        fitted, layered = FittedPool(pool, self.prefix_tokens), form_of(pool) == "layers"
        x: Tensor = features["token_embeddings"]
        prompt = 0 if self.include_prompt else _prompt_length(features)
        if "cu_seq_lens_q" in features:
            if layered:
                raise InputError(
                    f"{self.method}: reads all layers, which come padded; load the model without unpadding"
                )
            bags = Bags(x.squeeze(0), features["cu_seq_lens_q"].long())
            return fitted, _without_prompt_of_bags(bags, prompt, self.prefix_tokens), None
        mask = features.get("attention_mask")
        real = None if mask is None or mask.shape[-1] != x.shape[1] else mask.bool()
        real = _without_prompt(x, real, prompt, self.prefix_tokens)
        if not layered:
            return fitted, x, real
        if "all_layer_embeddings" not in features:
            raise InputError(f"{self.method}: reads all layers; load the transformer with output_hidden_states=True")
        return fitted, stack_layers(features["all_layer_embeddings"]), real


class PooledVectors(nn.Module):
    """A reducer of documents behind a `MultiVectorEncoder` of sentence-transformers 6: as its last module, which is saved with
    it, or for one call, `encode_document(texts, token_pooling=PooledVectors("hierarchical", factor=4))`.

    Args:
        method: name of a reducer that needs nothing but tokens, see `cenote list`.
        factor: how many times fewer vectors.
        protect: leading vectors of a document, [CLS], that stay as they are.
        tasks: what is reduced; queries are not, unless they are named.
        settings: of the reducer.

    Raises:
        InputError: where there is no such reducer or it cannot be built.

    Example:
        >>> pooling = PooledVectors("sequential", factor=2, protect=0)
        >>> [tuple(v.shape) for v in pooling.pool([torch.ones(4, 2), torch.ones(3, 2)])]
        [(2, 2), (2, 2)]

    Note:
        A batch is reduced together. Reducing twice reduces further: leave `token_pooling` out of calls of a model that ends
        with one.
    """

    config_keys: ClassVar[list[str]] = ["method", "factor", "protect", "tasks", "settings"]
    forward_kwargs: ClassVar[set[str]] = {"task"}

    def __init__(
        self,
        method: str = "hierarchical",
        factor: float = 2.0,
        protect: int = 1,
        tasks: str | Sequence[str] = ("document",),
        **settings: Any,
    ) -> None:
        super().__init__()
        require_at_least(0, protect=protect)
        self.method, self.factor, self.protect, self.settings = method, factor, protect, settings
        self.tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        self.reducer = reducer_of(method, factor, **settings)
        _become("sentence_transformers.multi_vector_encoder.modules.token_pooling", "BaseTokenPooling", type(self))

    def on_model_ready(self, model: Any) -> None:
        """Called by sentence-transformers: nothing here hangs on the model."""

    def applies_to(self, task: str | None) -> bool:
        """Whether what is encoded for a task is reduced; without one it is a document."""
        return (task or "document") in self.tasks

    def forward(self, features: MutableMapping[str, Any], task: str | None = None) -> MutableMapping[str, Any]:
        """Fewer `token_embeddings`, with their `attention_mask`."""
        x: Tensor = features["token_embeddings"]
        if self.applies_to(task) and len(x):
            made = self.reducer(x, mask=features["attention_mask"].bool(), protect=self.protect)
            features["token_embeddings"] = made.tokens
            features["attention_mask"] = made.real
        return features

    def pool(
        self,
        embeddings: list[Tensor] | Tensor,
        *,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        padding_side: str = "right",
    ) -> list[Tensor] | Tensor:
        """Documents that are encoded already: a list of `[tokens, dim]`, or `[documents, tokens, dim]` with a mask.

        Raises:
            InputError: for padded documents without a mask, or padding that is not to come back on the right.
        """
        if not self.applies_to(task) or not len(embeddings):
            return embeddings
        if isinstance(embeddings, Tensor):
            if attention_mask is None or padding_side != "right":
                raise InputError(
                    "embeddings: give padded documents with attention_mask, padded on the right, or a list"
                )
            return self.reducer(embeddings, mask=attention_mask.bool(), protect=self.protect).tokens
        return list(in_batches(self.reducer, Bags.from_list(embeddings), self.protect))

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write `config.json`."""
        card = {name: getattr(self, name) for name in self.config_keys}
        files.write_whole(Path(output_path) / CONFIG, json.dumps(files.sealed(card), indent=1))

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **hub: Any) -> PooledVectors:
        """Read what `save` wrote, from a folder or from the Hugging Face Hub.

        Raises:
            InputError: naming what cannot be read.
        """
        fields: dict[str, Any] = {
            "method": str,
            "factor": (int, float),
            "protect": int,
            "tasks": list,
            "settings": dict,
        }
        try:
            path = _file(model_name_or_path, subfolder, CONFIG, hub)
            card = files.read_card(path, "save it again", **fields)
        except OSError as error:
            raise InputError(f"{model_name_or_path}: holds no PooledVectors ({error}); save it again") from error
        return cls(card["method"], card["factor"], card["protect"], card["tasks"], **card["settings"])

    def extra_repr(self) -> str:
        return f"{self.method!r}, factor={self.factor:g}, protect={self.protect}"


def replace_pooling(model: Any, method: str, **settings: Any) -> Any:
    """A loaded `SentenceTransformer` with another pooling; its other modules are shared with the one given.

    Prompts, the width that embeddings are cut to, the similarity, and whether tokens of a prompt are pooled stay as they were.

    Args:
        model: with one pooling module.
        method: name of a pool, as in `cenote list`.
        settings: of `CenotePooling`.

    Raises:
        InputError: where the model has no pooling module, or several.
    """
    modules = list(model)
    places = [i for i, m in enumerate(modules) if type(m).__name__ in ("Pooling", "CenotePooling")]
    if len(places) != 1:
        raise InputError(
            f"model: expected one pooling module, found {len(places)} among {[type(m).__name__ for m in modules]}"
        )
    old = modules[places[0]]
    modules[places[0]] = CenotePooling(method, **{"include_prompt": getattr(old, "include_prompt", True), **settings})
    kept = {name: getattr(model, name) for name in KEPT if getattr(model, name, None) is not None}
    replaced = type(model)(modules=modules, device=str(model.device), **kept)
    if model.training:
        replaced.train()
    return replaced


def _without_prompt(x: Tensor, mask: Tensor | None, length: int, prefix_tokens: int) -> Tensor | None:
    """The mask without the tokens of a prompt, the first `length` real ones, of which the prefix tokens are none."""
    if not length:
        return mask
    real = real_tokens(x, mask)
    return real & (~first_tokens(real, length) | first_tokens(real, prefix_tokens))


def _without_prompt_of_bags(bags: Bags, length: int, prefix_tokens: int) -> Bags:
    if not length:
        return bags
    values, real = bags.to_padded()
    kept = _without_prompt(values, real, length, prefix_tokens)
    return Bags.from_padded(values, kept)


def _prompt_length(features: Mapping[str, Any]) -> int:
    length = features.get("prompt_length", 0)
    return int(length.flatten()[0]) if isinstance(length, Tensor) else int(length)


def _file(place: str, subfolder: str, name: str, hub: dict[str, Any]) -> Path:
    if Path(place).is_dir():
        return Path(place) / subfolder / name
    from sentence_transformers.util import load_file_path

    known = {k: hub[k] for k in ("token", "cache_folder", "revision", "local_files_only") if k in hub}
    path = load_file_path(place, filename=name, subfolder=subfolder, **known)
    if path is None:
        raise FileNotFoundError(f"{name} is missing")
    return Path(path)


def _become_module() -> None:
    """Tell sentence-transformers that the pooling is one of its modules, so that it calls the hook."""
    _become("sentence_transformers.base.modules.module", "Module", CenotePooling)


def _become(module: str, base: str, own: type[nn.Module]) -> None:
    """Tell sentence-transformers, where it is in use, that a class is one of its own.

    A base class would do the same, but would have to be imported here.
    """
    there = sys.modules.get("sentence_transformers")
    found = sys.modules.get(module)
    if there is not None and found is not None:
        getattr(found, base).register(own)
