"""Whisper tiny.en: its encoder, also cut to short sounds, and what it hears."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import nn

from cenote.models import Backbone, load

pytestmark = pytest.mark.real("a speech model of 38 million parameters")

RATE = 16000
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
SPOKEN = "284916"


@pytest.fixture(scope="module")
def backbone(model_folder: Callable[[str], Path]) -> Backbone:
    return load(str(model_folder("whisper-tiny.en")))


def sweep(seconds: float) -> NDArray[np.float32]:
    return np.sin(np.cumsum(np.linspace(0.02, 1.2, int(seconds * RATE)))).astype(np.float32)


def test_states_are_those_of_the_runtime_it_came_from(backbone: Backbone) -> None:
    """Three outputs for a sine sweep and their mean size, as CTranslate2 computes them from the carried file."""
    assert (backbone.layout.kind, backbone.layout.blocks, backbone.layout.prefix_tokens) == ("audio", 4, 0)
    found = backbone([(sweep(3), RATE)])
    state = found.layers[4][0]
    assert state.shape == (1500, 384)
    got = [float(v) for v in (state[10, 0], state[100, 100], state[1400, 383], state.abs().mean())]
    assert got == pytest.approx([0.4802, -0.5585, -0.2518, 0.5985], abs=2e-3)
    assert found.mask is not None
    # 20 milliseconds a token
    assert found.mask[0].tolist() == [True] * 150 + [False] * 1350


@torch.no_grad()
def test_positions_can_be_cut_to_short_sounds(whisper: Any) -> None:
    model, processor = whisper
    features = processor(sweep(2), sampling_rate=RATE, return_tensors="pt").input_features
    encoder = model.get_encoder()
    cut = copy.deepcopy(encoder)
    cut.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:128].clone())
    cut.config.max_source_positions = 128
    whole, short = encoder(features, output_hidden_states=True), cut(features[..., :256], output_hidden_states=True)
    assert short.last_hidden_state.shape == (1, 128, 384)
    # the last frame sees beyond the cut
    torch.testing.assert_close(short.hidden_states[0][:, :127], whole.hidden_states[0][:, :127], rtol=0, atol=1e-4)
    heard, of_whole = short.last_hidden_state[0, :100], whole.last_hidden_state[0, :100]
    assert torch.cosine_similarity(heard, of_whole, dim=-1).mean() > 0.85
    assert torch.cosine_similarity(heard, of_whole.roll(30, 0), dim=-1).mean() < 0.8


@torch.no_grad()
def test_hears_spoken_digits(whisper: Any, data_dir: Path) -> None:
    model, processor = whisper
    heard = []
    for speaker in SPEAKERS:
        sound = clip(data_dir / "fsdd" / "recordings", speaker)
        inputs = processor(sound, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
        (text,) = processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True)
        heard.append(re.sub(r"\D", "", text))
    assert heard.count(SPOKEN) >= 4


def clip(folder: Path, speaker: str) -> NDArray[np.float32]:
    """The digits, each between two pauses."""
    pause = np.zeros(RATE // 5)
    parts = [pause]
    for digit in SPOKEN:
        rate, samples = wavfile.read(folder / f"{digit}_{speaker}_0.wav")
        parts += [resample_poly(samples / 2**15, RATE // rate, 1), pause]
    return np.concatenate(parts).astype(np.float32)
