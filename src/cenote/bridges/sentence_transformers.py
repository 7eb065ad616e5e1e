"""Any cenote pool as a module of sentence-transformers.

```python
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Transformer
from cenote.bridges.sentence_transformers import CenotePooling

model = SentenceTransformer(modules=[Transformer("sentence-transformers/all-MiniLM-L6-v2"), CenotePooling("simpool")])
```
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cenote.bridges.transformers import embedding_width, named_pool, reads_layers
from cenote.core import Bags, InputError, Tokens, as_tokens, files
from cenote.core.masks import without_first

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CenotePooling(nn.Module):
    """A pool between a `Transformer` and what follows it; reads `token_embeddings`, writes `sentence_embedding`.

    Args:
        method: name of a pool of sets or of layers, as in `cenote list`. A pool of layers reads all hidden states, which the
            transformer is then told to give.
        dim: width of the token embeddings; default: asked of the model when it is put together (sentence-transformers 6 or
            newer; older versions need it here).
        layers: number of layers, likewise.
        include_prompt: False: tokens of the prompt are left out.
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
        The pool sees every real token, [CLS] and [SEP] included, as sentence-transformers' own poolings do. A saved model is
        loaded with `SentenceTransformer(folder, trust_remote_code=True)`: since version 6 that is asked for every module of
        another package. Weights are kept as safetensors; nothing is unpickled.
    """

    def __init__(
        self,
        method: str = "mean",
        dim: int | None = None,
        layers: int | None = None,
        include_prompt: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.method = method
        self.dim = dim
        self.layers = layers
        self.include_prompt = include_prompt
        self.settings = settings
        self.pool: nn.Module | None = None
        if dim is not None:
            self.pool = named_pool(method, dim, layers, settings)
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
            self.pool = named_pool(self.method, self.dim, self.layers, self.settings)
            like = next(model.parameters(), torch.zeros(()))
            self.pool.to(like.device, like.dtype)
        if reads_layers(self.pool) and config is not None:
            config.output_hidden_states = True

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding` to the features."""
        pool, given, mask = self._prepared(features)
        y = pool(given) if mask is None else pool(given, mask)
        features["sentence_embedding"] = y.flatten(1)
        return features

    def attend(self, features: dict[str, Any]) -> Any:
        """Output and weights of the pool: what each embedding took from each token."""
        pool, given, mask = self._prepared(features)
        return pool.attend(given) if mask is None else pool.attend(given, mask)

    def get_embedding_dimension(self) -> int:
        """Width of the sentence embedding."""
        return embedding_width(self._built())

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
            "settings": self.settings,
        }
        state = {k: v.contiguous() for k, v in pool.state_dict().items()}
        files.write_whole(Path(output_path) / WEIGHTS, save(state))
        files.write_whole(Path(output_path) / CONFIG, json.dumps(card, indent=2))

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **hub: Any) -> CenotePooling:
        """Read what `save` wrote, from a folder or from the Hugging Face Hub.

        Raises:
            InputError: naming what cannot be read.
        """
        try:
            found = [_file(model_name_or_path, subfolder, name, hub) for name in (CONFIG, WEIGHTS)]
            card: dict[str, Any] = json.loads(found[0].read_text("utf-8"))
            state = load_file(found[1])
            pooling = cls(card["method"], card["dim"], card["layers"], card["include_prompt"], **card["settings"])
            pooling._built().load_state_dict(state)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
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

    def _prepared(self, features: dict[str, Any]) -> tuple[Any, Tensor | Tokens, Tensor | None]:
        """The pool and its input: sets of tokens, or a stack of layers and a mask."""
        pool = self._built()
        x: Tensor = features["token_embeddings"]
        drop = 0 if self.include_prompt else _prompt_length(features)
        if "cu_seq_lens_q" in features:
            if reads_layers(pool):
                raise InputError(
                    f"{self.method}: reads all layers, which come padded; load the model without unpadding"
                )
            return pool, Bags(x.squeeze(0), features["cu_seq_lens_q"].long()).drop_first(drop), None
        mask = features.get("attention_mask")
        real = None if mask is None or mask.shape[-1] != x.shape[1] else mask.bool()
        if not reads_layers(pool):
            return pool, as_tokens(x, real).drop_first(drop), None
        if "all_layer_embeddings" not in features:
            raise InputError(f"{self.method}: reads all layers; load the transformer with output_hidden_states=True")
        stack = torch.stack(tuple(features["all_layer_embeddings"])[1:], 1)
        return pool, stack, without_first(stack, real, drop)


def replace_pooling(model: Any, method: str, **settings: Any) -> Any:
    """A loaded `SentenceTransformer` with another pooling; its other modules are shared with the one given.

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
    modules[places[0]] = CenotePooling(method, **settings)
    return type(model)(
        modules=modules, device=str(model.device), prompts=model.prompts, default_prompt_name=model.default_prompt_name
    )


def _prompt_length(features: dict[str, Any]) -> int:
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
    """Tell sentence-transformers, where it is in use, that the class is one of its modules, so that it calls the hook.

    A base class would do the same, but would have to be imported here.
    """
    there = sys.modules.get("sentence_transformers")
    base = sys.modules.get("sentence_transformers.base.modules.module")
    if there is not None and base is not None:
        base.Module.register(CenotePooling)
