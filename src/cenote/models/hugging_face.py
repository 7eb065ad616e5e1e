"""What the adapters of transformers' models share, whatever kind they take."""

from __future__ import annotations

import copy
import inspect
import logging
import typing
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.base import Backbone, Identity, Kind, Layout, Prepared, States, to_device
from cenote.models.maps import maps

BIGGER_THAN_ANY = 10**9


class HuggingFaceBackbone(Backbone):
    """What the adapters of the three kinds share."""

    def __init__(self, model: nn.Module, identity: Identity, notes: Sequence[str]) -> None:
        self.model: Any = model.requires_grad_(False)
        self.identity = identity
        self.takes = set(inspect.signature(model.forward).parameters)
        weight = next(model.parameters())
        self.device, self.precision = weight.device, weight.dtype
        self.notes = list(notes)
        self.layout = self._layout()

    @property
    def config(self) -> Any:
        """Of the part of the model that is used."""
        return self.model.config

    @abstractmethod
    def sample(self) -> tuple[Any, str]:
        """One item, and what it is in words."""

    @abstractmethod
    def mask(self, prepared: Prepared, output: Any) -> Tensor | None:
        """Which of the output's tokens are real."""

    @abstractmethod
    def lie(self, prepared: Prepared, tokens: int) -> tuple[int, tuple[int, int] | None]:
        """Prefix tokens and grid of the sample."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Of the preprocessing."""

    def to(self, device: str) -> HuggingFaceBackbone:
        """The same on another device."""
        self.model = self.model.to(device)
        self.device = next(self.model.parameters()).device
        return self

    def twin(self) -> HuggingFaceBackbone | None:
        """On a CPU: a model keeps tables for the length that it saw last, so that two threads need one each."""
        if self.device.type != "cpu":
            return None
        other = copy.copy(self)
        try:
            other.model = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        except Exception:  # a model's own code may hold anything
            return None
        return other

    @torch.inference_mode()
    def forward(self, prepared: Prepared) -> Any:
        """The model's own forward."""
        return self.model(**self.arguments(prepared))

    @torch.inference_mode()
    def states(self, prepared: Prepared, layers: Sequence[int] | None = None, attentions: bool = False) -> States:
        """See `Backbone.states`."""
        blocks = self.layout.blocks
        wanted = (blocks,) if layers is None else tuple(layers)
        for number in wanted:
            if not 0 <= number <= blocks:
                raise InputError(f"layers: there is no layer {number}; numbers go from 0 to {blocks}")
        hidden = any(n < blocks for n in wanted)
        weights: Sequence[Tensor] | None = None
        if attentions:
            output, weights = self._with_attentions(prepared, hidden)
        else:
            output = self._run(prepared, hidden)
        mask = self.mask(prepared, output)
        found = {n: _tokens(_hidden(output, n, blocks)) for n in wanted}
        return States(found, mask, None if weights is None else tuple(weights))

    def arguments(self, prepared: Prepared) -> dict[str, Tensor]:
        """What the model's forward is called with."""
        known = {k: v for k, v in prepared.inputs.items() if k in self.takes or "kwargs" in self.takes}
        return to_device(known, self.device, self.precision)

    def _run(self, prepared: Prepared, hidden: bool, attentions: bool = False) -> Any:
        options: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        if attentions:
            options["output_attentions"] = True
        if "use_cache" in self.takes:
            options["use_cache"] = False
        return self.model(**self.arguments(prepared), **options)

    def _with_attentions(self, prepared: Prepared, hidden: bool) -> tuple[Any, Sequence[Tensor]]:
        try:
            with maps(self.model, self.identity.model_class) as weights:
                return self._run(prepared, hidden), weights
        except InputError as error:
            refused = error
        # attention that a model writes out itself is the model's to give
        with self._giving_attentions():
            output = self._run(prepared, hidden, attentions=True)
        given = getattr(output, "attentions", None)
        if not given or any(w is None for w in given):
            raise refused
        return output, given

    @contextmanager
    def _giving_attentions(self) -> Iterator[None]:
        before = getattr(self.config, "_attn_implementation", None)
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            if before is not None:
                self.model.set_attn_implementation(before)

    @torch.inference_mode()
    def _layout(self) -> Layout:
        item, words = self.sample()
        prepared = self.prepare([item])
        output = self._run(prepared, hidden=True)
        again = self._run(prepared, hidden=False)
        last = _tokens(output.last_hidden_state)
        if not torch.equal(last, _tokens(again.last_hidden_state)) and not torch.allclose(
            last, _tokens(again.last_hidden_state), atol=1e-3, rtol=1e-3, equal_nan=True
        ):
            raise InputError(
                f"backbone: {self.identity.model_class} gives other tokens each time (random masking?); "
                f"features of such a model cannot be reproduced"
            )
        if not bool(torch.isfinite(last).all()):
            self.notes.append("its output for the sample holds NaN or infinite numbers")
        hidden = getattr(output, "hidden_states", None)
        if not hidden:
            self.notes.append("gives no hidden states: only its output can be extracted")
        states = [_tokens(h) for h in hidden[:-1]] if hidden else []
        states.append(last)
        mask = self.mask(prepared, output)
        prefix, grid = self.lie(prepared, last.shape[1])
        return Layout(
            kind=self.kind(),
            blocks=len(states) - 1,
            dims=tuple(s.shape[2] for s in states),
            tokens=tuple(
                s.shape[1] if mask is None or mask.shape[1] != s.shape[1] else int(mask.sum()) for s in states
            ),
            prefix_tokens=prefix,
            grid=grid,
            heads=_number(self.config, "num_attention_heads", "encoder_attention_heads", "num_heads", "n_head"),
            parameters=sum(p.numel() for p in self.model.parameters()),
            sample=words,
            preprocessing=dict(self.settings()),
            notes=tuple(self.notes),
        )

    @abstractmethod
    def kind(self) -> Kind:
        """What it takes."""


def processor(cls_name: str, folder: Path, trust_remote_code: bool, what: str) -> Any:
    """The preprocessing that is saved beside a model.

    Raises:
        InputError: where none is.
    """
    with quiet():
        transformers = required_transformers()
        try:
            return getattr(transformers, cls_name).from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (ValueError, OSError, RuntimeError, KeyError, ImportError, TypeError, AttributeError) as error:
            raise InputError(
                f"backbone: {folder} does not say how {what} are prepared ({why(error, trust_remote_code)}); "
                f"save the model's processor or tokenizer into the folder"
            ) from error


def plain(value: Any) -> Any:
    """Settings as JSON can hold them, without what only tells where they came from."""
    if isinstance(value, Mapping):
        left_out = (
            "processor_class",
            "name_or_path",
            "_name_or_path",
            "transformers_version",
            "feature_extractor_type",
        )
        return {str(k): plain(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])) if k not in left_out}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, int | float | str | bool) or value is None else str(value)


def _hidden(output: Any, number: int, blocks: int) -> Tensor:
    return output.last_hidden_state if number == blocks else output.hidden_states[number]


def _tokens(state: Tensor) -> Tensor:
    """`[batch, tokens, dim]`, also of a feature map `[batch, dim, height, width]`."""
    return state.flatten(2).transpose(1, 2) if state.dim() == 4 else state


def _number(config: Any, *names: str) -> int | None:
    found = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
    return None if found is None else int(found)


def why(error: Exception, trusted: bool) -> str:
    """What an exception of transformers says, on one line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text and not trusted:
        return "needs Python code from its own repository; read that code, then allow it with --trust-remote-code"
    return text[:400] or type(error).__name__


def required_transformers() -> Any:
    """transformers, where it is installed.

    Raises:
        InputError: where it is not.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError("backbone: needs transformers; pip install 'cenote[models]'") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice of transformers while it loads."""
    transformers = required_transformers()
    logger, bars = logging.getLogger("transformers"), typing.cast(Any, transformers.utils.logging)
    before, had_bars = logger.level, bars.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if had_bars:
            bars.enable_progress_bar()
