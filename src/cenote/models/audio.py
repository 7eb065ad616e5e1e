"""Sound encoders of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from cenote.models.base import Identity, Kind, Prepared
from cenote.models.grids import lie
from cenote.models.hugging_face import HuggingFaceBackbone, plain, processor

SECONDS = 1.0


class AudioBackbone(HuggingFaceBackbone):
    """Tokens of a sound: one per frame, or patches of a spectrogram after the model's own special tokens.

    Sounds come as `(samples, rate)` and are brought to the model's rate. A model that was trained without a mask for padding
    sees only sounds of one length in a batch, so that what stands beside a sound never changes its tokens.

    Args:
        model: takes `input_values` or `input_features`.
        folder: with the feature extractor's settings.
        identity: which model.
        notes: on loading.
        trust_remote_code: allow an extractor's own code.
    """

    def __init__(
        self, model: nn.Module, folder: Path, identity: Identity, notes: Sequence[str], trust_remote_code: bool
    ) -> None:
        self.extractor = processor("AutoFeatureExtractor", folder, trust_remote_code, "sounds")
        self.rate = int(self.extractor.sampling_rate)
        # raw samples are padded to the longest; spectrograms to a fixed length
        self.is_waveform = getattr(model, "main_input_name", "") == "input_values" and not hasattr(
            self.extractor, "num_mel_bins"
        )
        self.masks_padding = bool(getattr(self.extractor, "return_attention_mask", False))
        self.equal_sizes = self.is_waveform and not self.masks_padding
        self.shortest = _shortest(model) if self.is_waveform else 1
        super().__init__(model, identity, notes)

    def kind(self) -> Kind:
        return "audio"

    def sample(self) -> tuple[Any, str]:
        noise = np.random.RandomState(0).randn(int(SECONDS * self.rate)).astype(np.float32) * 0.1
        return (noise, self.rate), f"a sound of {SECONDS:g} s at {self.rate} samples a second"

    def prepare(self, items: Sequence[Any]) -> Prepared:
        """At the model's rate, normalised, padded as the model's own settings say."""
        sounds = [self._long_enough(_at_rate(samples, rate, self.rate)) for samples, rate in items]
        options: dict[str, Any] = {"sampling_rate": self.rate, "return_tensors": "pt"}
        if self.is_waveform:
            options["padding"] = True
        if not self.is_waveform or self.masks_padding:
            options["return_attention_mask"] = True
        try:
            made = dict(self.extractor(sounds, **options))
        except TypeError:
            options.pop("return_attention_mask", None)
            made = dict(self.extractor(sounds, **options))
        longest = getattr(self.extractor, "n_samples", None)
        cut = 0 if not isinstance(longest, int) else sum(len(s) > longest for s in sounds)
        return Prepared({k: v for k, v in made.items() if isinstance(v, Tensor)}, cut)

    def _long_enough(self, sound: Any) -> Any:
        # what is shorter than one frame gives one token all the same
        return np.pad(sound, (0, max(self.shortest - len(sound), 0)))

    def mask(self, prepared: Prepared, output: Any) -> Tensor | None:
        given = prepared.inputs.get("attention_mask")
        tokens = output.last_hidden_state.shape[1]
        if given is None or output.last_hidden_state.dim() != 3 or bool(given.bool().all()):
            return None
        strided = getattr(self.model, "_get_feature_vector_attention_mask", None)
        if strided is not None:
            return strided(tokens, given).bool().to(self.device)
        # encoders of spectrograms that shorten them by a whole factor: a token is real where any of its frames is
        step = given.shape[1] // tokens
        if step * tokens != given.shape[1]:
            return None
        return given.bool().view(len(given), tokens, step).any(2).to(self.device)

    def lie(self, prepared: Prepared, tokens: int) -> tuple[int, tuple[int, int] | None]:
        config = self.config
        stride = [getattr(config, f"{way}_stride", None) for way in ("frequency", "time")]
        patch = getattr(config, "patch_size", None)
        bins = getattr(config, "num_mel_bins", None)
        frames = getattr(config, "max_length", None)
        if isinstance(patch, int) and isinstance(bins, int) and isinstance(frames, int) and stride[0] and stride[1]:
            grid = (bins - patch) // stride[0] + 1, (frames - patch) // stride[1] + 1
            extra = tokens - math.prod(grid)
            if 0 <= extra <= 16:
                return extra, grid
        values = prepared.inputs.get("input_features", prepared.inputs.get("input_values"))
        if values is not None and values.dim() == 4:
            found = lie(tokens, values.shape[2], values.shape[3], patch)
            return found.prefix_tokens, found.grid
        return 0, None

    def settings(self) -> Mapping[str, Any]:
        kept = {k: v for k, v in self.extractor.to_dict().items() if k != "mel_filters"}
        return plain({"extractor": type(self.extractor).__name__, **kept})


def _shortest(model: Any) -> int:
    """Samples that the convolutions of a model of waveforms need for one frame."""
    kernels, strides = (getattr(model.config, f"conv_{what}", ()) for what in ("kernel", "stride"))
    length = 1
    for kernel, stride in reversed(list(zip(kernels, strides, strict=False))):
        length = (length - 1) * stride + kernel
    return length


def _at_rate(samples: Any, rate: int, wanted: int) -> Any:
    values = np.asarray(samples, dtype=np.float32)
    if rate == wanted:
        return values
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(values.astype(np.float64), wanted // common, rate // common).astype(np.float32)
