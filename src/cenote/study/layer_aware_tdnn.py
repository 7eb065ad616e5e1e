"""Where the layer that carries the answer changes from frame to frame, a layer pooling that chooses layers per frame names the
class better than one learned weighted sum of the layers (by more than 10 points); and naming speakers from all hidden states of
an encoder of speech, it is no worse than the weighted sum.

Refuted if the choice per frame is at most 10 points above the weighted sum on the first task, or if the weighted sum is more
than 2 points above it on the second.

First task: stacks of six layers and six frames. In each frame the six class vectors lie on the six layers in a random order, so
that an even sum of the layers says nothing, and no layer alone says more than one frame in six; the layer that holds the
clip's class is marked. Second task: a transformer of six layers is trained to name the phones of made-up speech and frozen;
speakers are to be named from all its hidden states. Attentive statistics pool over time in every arm.

Knocked out, on the first task: the gates (all open, the largest value goes on), and the choice per frame (a clip's mean gate
for all its frames, the mean over layers).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.pool import LayerAttentionPool, LayerAwareTDNN, SpeakerStatisticsPool
from cenote.study.harness import Arms, Check, Findings, Gate, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.speech import BANDS, FLOOR, PHONES, inventory, phone_sequences, spoken
from cenote.study.harness.training import descend

LAYERS, FRAMES, WIDTH, CLASSES = 6, 24, 24, 6
WANDERING_FRAMES = LAYERS
HIDDEN, OUT, CHANNELS = 32, 32, 16
TRAIN: dict[Size, int] = {"smoke": 64, "small": 600, "full": 1200}
TEST: dict[Size, int] = {"smoke": 64, "small": 300, "full": 600}
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 12, "full": 30}
ENCODER_STEPS: dict[Size, int] = {"smoke": 2, "small": 250, "full": 1000}
BATCH, LEARNING_RATE = 32, 3e-3
# the commonest of six classes among 300 clips
CHANCE = 0.21

SEEDS = {"small": 3, "full": 5}

LAST, SUM, CHOICE, WHOLE = "last layer", "weighted sum of layers", "layers chosen per frame", "the whole network"


class LayerSum(nn.Module):
    """One learned weight per layer, the same for all frames; then attentive statistics. `last`: the last layer alone."""

    def __init__(self, layers: int, last: bool = False) -> None:
        super().__init__()
        self.scores = None if last else nn.Parameter(torch.zeros(layers))
        self.inward = nn.Linear(WIDTH, HIDDEN)
        self.time_pool = SpeakerStatisticsPool(HIDDEN, OUT)

    def forward(self, x: Float[Tensor, "clips layers frames width"]) -> Float[Tensor, "clips out"]:
        mixed = x[:, -1] if self.scores is None else torch.einsum("l,bltd->btd", self.scores.softmax(0), x)
        return self.time_pool(torch.relu(self.inward(mixed)))


OPEN, SAME = "all gates open", "same gate for all frames"


class OpenGates(LayerAttentionPool):
    """The largest value over all layers, each of them open."""

    def gates(self, u: Float[Tensor, "batch out_channels layers tokens"]) -> Float[Tensor, "batch heads layers tokens"]:
        return torch.ones_like(super().gates(u))


class SameGate(LayerAttentionPool):
    """A clip's mean gate for all its frames, and the mean over layers in place of the largest value."""

    def gates(self, u: Float[Tensor, "batch out_channels layers tokens"]) -> Float[Tensor, "batch heads layers tokens"]:
        gates = super().gates(u)
        return gates.mean(-1, keepdim=True).expand_as(gates)

    def _largest(
        self, gated: Float[Tensor, "batch heads channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_channels tokens"]:
        return super()._largest(gated.mean(3, keepdim=True), mask)


def _arms(layers: int) -> dict[str, Callable[[], nn.Module]]:
    aware = partial(LayerAwareTDNN, WIDTH, layers, OUT, CHANNELS, hidden=HIDDEN)
    return {
        LAST: partial(LayerSum, layers, last=True),
        SUM: partial(LayerSum, layers),
        CHOICE: partial(aware, front=None),
        WHOLE: aware,
    }


def _knocked_out(layers: int) -> dict[str, Callable[[], nn.Module]]:
    def built(pool: type[LayerAttentionPool]) -> nn.Module:
        model = LayerAwareTDNN(WIDTH, layers, OUT, CHANNELS, hidden=HIDDEN, front=None)
        model.layer_pool = pool(WIDTH, HIDDEN, layers, model.layer_pool.heads)
        return model

    return {OPEN: partial(built, OpenGates), SAME: partial(built, SameGate)}


class Stacks(NamedTuple):
    """Hidden states of all layers, and the class of each clip."""

    x: Float[Tensor, "clips layers frames width"]
    y: Int[Tensor, "clips"]


@study
def run(seed: int, size: Size) -> Findings:
    """Train each arm on both tasks, once per seed."""
    seeds = seeds_of(seed, size, **SEEDS)
    wandering, wandering_losses = trained(_wandering, seeds, size, lambda layers: _arms(layers) | _knocked_out(layers))
    speakers, speakers_losses = trained(_encoded, seeds, size)

    def rule(arm: str) -> tuple[Check, ...]:
        return (above(f"wandering layer: accuracy, {arm} minus weighted sum", wandering.minus(arm, SUM), 0.10),)

    def at_wandering(arm: str, level: float | None = CHANCE) -> Gate:
        beats = None if level is None else above("accuracy, wandering layer", wandering[arm], level)
        return gate(arm, beats, wandering_losses[arm])

    # an even sum of layers is the same for every clip of the first task, so that its training shows in the second
    at_speakers = [
        gate(arm, above("accuracy, speakers", speakers[arm], CHANCE), speakers_losses[arm]) for arm in (SUM, CHOICE)
    ]
    return Findings(
        seeds=seeds,
        parts=(Part(rule, CHOICE, knocked_out=(OPEN, SAME), against=(SUM,)),),
        gates=(at_wandering(CHOICE), *at_speakers, at_wandering(OPEN), at_wandering(SAME, None)),
        checks=(
            above("speakers: accuracy, choice per frame minus weighted sum", speakers.minus(CHOICE, SUM), 0.0, -0.02),
            above("speakers: accuracy, weighted sum minus last layer", speakers.minus(SUM, LAST), 0.0, in_rule=False),
            above(
                "speakers: accuracy, whole network minus weighted sum", speakers.minus(WHOLE, SUM), 0.0, in_rule=False
            ),
            above(
                "wandering layer: accuracy, whole network minus weighted sum",
                wandering.minus(WHOLE, SUM),
                0.0,
                in_rule=False,
            ),
        ),
        table=wandering.table("accuracy, wandering layer") + speakers.table("accuracy, speakers"),
        figure=partial(_draw, wandering=wandering, speakers=speakers),
        notes=(
            f"{TRAIN[size]:,} training clips of {FRAMES} frames, on the first task {WANDERING_FRAMES}, {EPOCHS[size]} passes, "
            f"widths of {HIDDEN}. The wandering layer is made for the method: it shows what a choice per frame can do and one "
            "weight per layer cannot.",
            "Phones and speakers of the second task are made up, because the package carries no recordings; "
            "docs/tables/real-speech.md has the same arms on real ones.",
            "The paper's claim is equal error rates on VCTK, LibriSpeech and VoxCeleb with large trained encoders, which this "
            "does not reach.",
        ),
    )


Losses = dict[str, list[list[float]]]


def accuracies(task: Callable[[int, Size], tuple[Stacks, Stacks]], seeds: tuple[int, ...], size: Size) -> Arms:
    """Of every arm, trained on what `task` gives for each seed."""
    return trained(task, seeds, size)[0]


def trained(
    task: Callable[[int, Size], tuple[Stacks, Stacks]],
    seeds: tuple[int, ...],
    size: Size,
    arms: Callable[[int], dict[str, Callable[[], nn.Module]]] = _arms,
) -> tuple[Arms, Losses]:
    """Accuracies of the arms for so many layers, and their losses, step by step, of each seed."""
    by_seed: dict[str, list[float]] = {}
    losses: Losses = {}
    for s in seeds:
        train, test = task(s, size)
        for name, build in arms(train.x.shape[1]).items():
            torch.manual_seed(s)
            model = nn.Sequential(build(), nn.Linear(OUT, CLASSES))
            losses.setdefault(name, []).append(train_on(model, train, EPOCHS[size] * (len(train.y) // BATCH), s))
            model.eval()
            with torch.no_grad():
                guess = torch.cat([model(part) for part in test.x.split(100)]).argmax(-1)
            by_seed.setdefault(name, []).append(float((guess == test.y).float().mean()))
    return Arms({name: tuple(values) for name, values in by_seed.items()}), losses


def train_on(model: nn.Module, train: Stacks, steps: int, seed: int) -> list[float]:
    """Cross-entropy of clips, or of their frames; the losses, step by step."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    batches = (torch.randint(len(train.y), (BATCH,), generator=generator) for _ in range(steps))
    losses = (F.cross_entropy(model(train.x[own]).flatten(0, -2), train.y[own].flatten()) for own in batches)
    return descend(model.parameters(), losses, steps, LEARNING_RATE, optimiser=torch.optim.AdamW)


def _wandering(seed: int, size: Size) -> tuple[Stacks, Stacks]:
    """In each frame every layer holds another class's vector; that of the clip's class is marked."""
    world = torch.Generator().manual_seed(seed)
    vectors, mark = torch.randn(CLASSES, WIDTH, generator=world), torch.randn(WIDTH, generator=world)

    def drawn(count: int, offset: int) -> Stacks:
        generator = torch.Generator().manual_seed(seed + 1 + offset)
        y = torch.randint(CLASSES, (count,), generator=generator)
        held = torch.rand(count, LAYERS, WANDERING_FRAMES, generator=generator).argsort(1)
        x = vectors[held] + (held == y.view(-1, 1, 1)).unsqueeze(-1) * mark
        return Stacks(x + torch.randn(x.shape, generator=generator), y)

    return drawn(TRAIN[size], 0), drawn(TEST[size], 1000)


class Encoder(nn.Module):
    """A transformer over frames of speech that names their phones."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(BANDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.out = nn.Linear(WIDTH, PHONES)

    def forward(self, x: Float[Tensor, "clips frames bands"]) -> Float[Tensor, "clips frames phones"]:
        return self.out(self.hidden_states(x)[:, -1])

    def hidden_states(self, x: Float[Tensor, "clips frames bands"]) -> Float[Tensor, "clips layers frames width"]:
        """Of the entrance and of every layer."""
        states = [self.enter((x - FLOOR) / 2)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return torch.stack(states, 1)


def _encoded(seed: int, size: Size) -> tuple[Stacks, Stacks]:
    """Hidden states of speech; the encoder learned phones from many speakers, none of them those that are to be named."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    formants = inventory(seed)

    def speech(tract: Tensor, tilt: Tensor) -> Stacks:
        phones = phone_sequences(torch.ones(len(tract), PHONES), FRAMES, generator)
        return Stacks(spoken(phones, formants, tract, tilt, 1.0, generator), phones)

    many = 8 * BATCH if size == "smoke" else 64 * BATCH
    encoder = Encoder()
    strangers = 0.85 + 0.3 * torch.rand(many, generator=generator), torch.randn(many, generator=generator)
    train_on(encoder, speech(*strangers), ENCODER_STEPS[size], seed)
    encoder.eval()
    tracts = 0.85 + 0.3 * (torch.arange(CLASSES) + 0.5) / CLASSES
    tilts = torch.randn(CLASSES, generator=generator)

    def drawn(count: int) -> Stacks:
        y = torch.randint(CLASSES, (count,), generator=generator)
        clips = speech(tracts[y], tilts[y] + 0.5 * torch.randn(count, generator=generator))
        with torch.no_grad():
            return Stacks(torch.cat([encoder.hidden_states(part) for part in clips.x.split(200)]), y)

    return drawn(TRAIN[size]), drawn(TEST[size])


def _draw(figure: Any, wandering: Arms, speakers: Arms) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, arms, label in ((left, wandering, "wandering layer"), (right, speakers, "speakers")):
        draw_arms(axes, arms, f"accuracy, {label}")
        axes.axvline(1 / CLASSES, color="#9aa0a6", linewidth=0.8, linestyle=":")
