"""From sound to speakers: a frozen encoder, the network over all of its layers, its training, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR

from cenote.core import files
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.models.base import Backbone
from cenote.pool.sequence.aam_softmax import AamSoftmax
from cenote.pool.sequence.layer_aware_tdnn.model import LayerAwareTDNN
from cenote.pool.sequence.layer_aware_tdnn.verification import trial_scores
from cenote.pool.training import History, train_steps

FORMAT = 1
CARD, TENSORS = "speakers.json", "speakers.safetensors"

Sound = Float[Tensor, "_samples"]
Layered = tuple[Tensor, Tensor | None]
"""States `[batch, layers, frames, dim]`, and True on real frames."""


class SpeakerCost(NamedTuple):
    """What a verifier takes.

    Attributes:
        parameters: of the network on top of the encoder.
        seconds_per_second: time for a second of sound, encoder included.
    """

    parameters: int
    seconds_per_second: float


class SpeakerVerifier(nn.Module):
    """A voice as a unit vector: all hidden states of a frozen encoder of sound, then `LayerAwareTDNN`.

    Args:
        encode: sounds of one rate to all hidden states `[batch, layers, frames, dim]` and a mask of the frames (or `None`).
        rate: samples a second that the encoder hears.
        settings: of `LayerAwareTDNN`, `dim` and `layers` among them.

    Raises:
        InputError: as `LayerAwareTDNN`, or where there is no sound.

    Example:
        >>> def encode(sounds):
        ...     frames = torch.stack([s[:160].view(10, 16) for s in sounds])
        ...     return torch.stack([frames, frames.abs()], 1), None
        >>> verifier = SpeakerVerifier(encode, rate=160, dim=16, layers=2, channels=16, hidden=16)
        >>> verifier.embed([torch.randn(160), torch.randn(160)]).shape
        torch.Size([2, 1, 192])

    Source: "Layer-aware TDNN: Speaker Recognition Using Multi-Layer Features from Pre-Trained Models", ICAIIC 2026.
    """

    def __init__(self, encode: Callable[[Sequence[Sound]], Layered], rate: int = 16000, **settings: Any) -> None:
        super().__init__()
        require_at_least(1, rate=rate)
        self.encode = encode
        self.rate = rate
        self.settings = settings
        self.pool = LayerAwareTDNN(**settings)
        self.encoder: Backbone | None = None

    @classmethod
    def on(cls, encoder: Backbone, rate: int = 16000, **settings: Any) -> Self:
        """On wav2vec 2.0, HuBERT, WavLM, Whisper or any other encoder of sound that `cenote.models.load` gives.

        Args:
            encoder: frozen.
            rate: samples a second of the sounds that come; the encoder brings them to its own.
            settings: of `LayerAwareTDNN`; `dim` and `layers` are the encoder's.

        Raises:
            InputError: where it is no encoder of sound, or its hidden states differ in width.
        """
        layout = encoder.layout
        if layout.kind != "audio" or len(set(layout.dims)) > 1:
            raise InputError(
                f"encoder: expected one of sound with hidden states of one width, got {layout.kind} with {layout.dims}"
            )
        layers = tuple(range(layout.blocks + 1))

        def encode(sounds: Sequence[Sound]) -> Layered:
            states = encoder([(s.detach().cpu().numpy(), rate) for s in sounds], layers)
            return torch.stack([states.layers[n] for n in layers], 1), states.mask

        made = cls(encode, rate, dim=layout.dims[0], layers=len(layers), **settings)
        made.encoder = encoder
        return made

    def states(self, sounds: Sequence[Sound]) -> Layered:
        """What the frozen encoder makes of sounds of any length."""
        if not sounds:
            raise InputError("sounds: expected at least one")
        with torch.no_grad():
            if self.encoder is None or not self.encoder.equal_sizes or len({len(s) for s in sounds}) == 1:
                return self.encode(sounds)
            alone = [self.encode([sound])[0][0].transpose(0, 1) for sound in sounds]
        lengths = torch.tensor([len(frames) for frames in alone])
        return pad_sequence(alone, True).transpose(1, 2), torch.arange(int(lengths.max())) < lengths[:, None]

    def embed(self, sounds: Sequence[Sound]) -> Float[Tensor, "sounds heads slice"]:
        """Unit vectors, one for each head of the loss, in eval mode; `enrolled` and `trial_scores` take these."""
        training = self.pool.training
        self.pool.eval()
        try:
            with torch.no_grad():
                return self.pool.embed(*self.states(sounds))
        finally:
            self.pool.train(training)

    def score(self, first: Sequence[Sound], second: Sequence[Sound]) -> Float[Tensor, "trials"]:
        """Cosines of pairs of sounds: the higher, the more alike the speakers."""
        return trial_scores(self.embed(first), self.embed(second))

    def cost(self, sounds: Sequence[Sound]) -> SpeakerCost:
        """Parameters, and time for each second of these sounds on this machine."""
        seconds = sum(len(s) for s in sounds) / self.rate
        begun = time.perf_counter()
        self.embed(sounds)
        taken = time.perf_counter() - begun
        return SpeakerCost(sum(p.numel() for p in self.pool.parameters()), taken / seconds)

    def save(self, folder: str | Path) -> None:
        """Write the network and its settings; the encoder is only named."""
        folder = Path(folder)
        of = None if self.encoder is None else self.encoder.identity.weights_sha256
        card = {"format": FORMAT, "rate": self.rate, "settings": self.settings, "encoder": of}
        files.write_saved(folder / CARD, folder / TENSORS, card, self.pool.state_dict())

    @classmethod
    def load(cls, folder: str | Path, encoder: Backbone) -> Self:
        """What `save` wrote, on the encoder that it was trained on.

        Raises:
            InputError: where the folder holds no verifier, or one of another encoder.
        """
        folder = Path(folder)
        try:
            card, state = files.read_saved(
                folder / CARD,
                folder / TENSORS,
                "train it again",
                format=int,
                rate=int,
                settings=dict,
                encoder=(str, type(None)),
            )
            files.require_format(folder, card, FORMAT)
            if card["encoder"] != encoder.identity.weights_sha256:
                raise InputError(
                    f"encoder: {folder} was trained on one of other weights than {encoder.identity.name}; load that one"
                )
            own = {k: v for k, v in card["settings"].items() if k not in ("dim", "layers")}
            made = cls.on(encoder, card["rate"], **own)
            made.pool.load_state_dict(state)
        except InputError:
            raise
        except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: holds no whole speaker verifier ({error}); name the folder of save") from error
        return made.eval()


def random_crop_of(sound: Sound, samples: int, generator: torch.Generator | None = None) -> Sound:
    """So many samples from a place drawn at random; a shorter sound is repeated first.

    >>> random_crop_of(torch.tensor([1.0, 2.0]), 4).tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    require_at_least(1, samples=samples, length_of_the_sound=len(sound))
    if len(sound) < samples:
        sound = sound.repeat(-(-samples // len(sound)))[:samples]
    start = int(torch.randint(len(sound) - samples + 1, (), generator=generator))
    return sound[start : start + samples]


def span_out(
    x: Float[Tensor, "batch layers frames dim"],
    share: float = 0.3,
    start: float = 0.05,
    length: int = 3,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch layers frames dim"]:
    """SpanOut: in some clips, spans of frames are set to zero in all layers.

    Args:
        x: hidden states.
        share: of the clips that lose frames.
        start: how often a frame begins a span.
        length: of a span; spans may overlap.
        generator: of the draw.

    >>> span_out(torch.ones(1, 2, 5, 1), share=1.0, start=1.0).sum().item()
    0.0
    """
    if not 0 <= share <= 1 or not 0 <= start <= 1:
        raise InputError(f"share, start: expected shares from 0 to 1, got {share}, {start}")
    require_at_least(1, length=length)
    batch, _, frames, _ = x.shape
    begins = torch.rand(batch, frames, generator=generator) < start
    lost = begins.clone()
    for late in range(1, min(length, frames)):
        lost[:, late:] |= begins[:, :-late]
    lost &= torch.rand(batch, 1, generator=generator) < share
    return x.masked_fill(lost[:, None, :, None].to(x.device), 0)


def train_speakers(
    verifier: SpeakerVerifier,
    sounds: Sequence[Sound],
    speakers: Int[Tensor, "sounds"],
    *,
    steps: int = 10_000,
    batch: int = 128,
    seconds: float = 3.0,
    lr: float = 3e-3,
    rise: float = 0.1,
    spans: bool = False,
    margin: float = 0.2,
    scale: float = 30.0,
    seed: int = 0,
) -> History:
    """The authors' recipe: crops of 3 s, the margin loss, the rate once up and down; the encoder stays as it is.

    Args:
        verifier: whose network is trained; its mode afterwards is eval.
        sounds: to learn from.
        speakers: whose each is, numbers from 0.
        steps, batch: of the training.
        seconds: of a crop.
        lr: the highest rate.
        rise: share of the steps in which the rate rises to it.
        spans: whether spans of frames are left out, see `span_out`.
        margin, scale: of `AamSoftmax`.
        seed: of crops, batches and the loss's own weights.

    Returns:
        How it went; one mean loss for each hundred steps.

    Raises:
        InputError: where there are not as many speakers as sounds.

    Example:
        >>> def encode(sounds):
        ...     frames = torch.stack([s.view(-1, 16) for s in sounds])
        ...     return torch.stack([frames, frames.abs()], 1), None
        >>> _ = torch.manual_seed(0)
        >>> verifier = SpeakerVerifier(encode, rate=160, dim=16, layers=2, channels=16, hidden=16, front=None)
        >>> loud = [(1 + i % 2) * torch.randn(400) for i in range(8)]
        >>> history = train_speakers(verifier, loud, torch.arange(8) % 2, steps=30, batch=8, seconds=1.0, scale=5.0)
        >>> len(history.losses)
        1
        >>> verifier.score(loud[:2], loud[2:4]).shape
        torch.Size([2])

    Source: "Layer-aware TDNN: Speaker Recognition Using Multi-Layer Features from Pre-Trained Models", ICAIIC 2026.

    Note:
        Which optimiser the authors take was not found out; here it is Adam.
    """
    if len(sounds) != len(speakers) or not len(sounds):
        raise InputError(
            f"speakers: expected one for each of at least one sound, got {len(speakers)} for {len(sounds)}"
        )
    require_positive(seconds=seconds, lr=lr)
    if not 0 < rise < 1:
        raise InputError(f"rise: expected a share of the steps between 0 and 1, got {rise}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = AamSoftmax(
            verifier.pool.out_dim, int(speakers.max()) + 1, verifier.pool.loss_heads, margin=margin, scale=scale
        )
    loss.to(next(verifier.pool.parameters()))
    both = nn.ModuleList([verifier.pool, loss])
    samples = max(1, round(seconds * verifier.rate))

    def draw() -> tuple[Layered, Tensor]:
        chosen = torch.randint(len(sounds), (batch,), generator=generator)
        crops = [random_crop_of(sounds[i], samples, generator) for i in chosen.tolist()]
        x, mask = verifier.states(crops)
        return (span_out(x, generator=generator) if spans else x, mask), speakers[chosen]

    adam = torch.optim.Adam(both.parameters(), lr=lr)
    history = train_steps(
        both,
        draw,
        lambda drawn: loss(verifier.pool(*drawn[0]), drawn[1]),
        adam,
        steps=steps,
        schedule=OneCycleLR(adam, lr, total_steps=steps + 1, pct_start=rise),
    )
    verifier.eval()
    return history
