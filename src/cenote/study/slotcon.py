"""SlotCon, trained on images of several digits without labels, groups their pixels better than the same network untrained: the
adjusted Rand index of its groups with the true regions is at least 0.1 higher, and the prototypes do not collapse.

Refuted if the index is not above that of the untrained network, or if fewer than 4 prototypes are in use or the entropy of
their mean assignment is below 1 nat.

Images are 24 x 24: two or three digits of different classes on a textured background. The regions are the background and each
digit. Also measured: an image-level contrastive training of the same encoder, SlotCon without centering, prototypes found by
k-means, and what nearest neighbours tell about a digit's class from its slot or from the mean of the image.

Knocked out: that both views show one image (the second is of another one, with boxes and losses as before), and the training.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Adam

from cenote.pool import SemanticGrouping, SlotCon, SlotConTrainer, TwoCrops
from cenote.pool.attention.slotcon.views import View
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import Digits, digits
from cenote.study.harness.training import descend

SEEDS = {"small": 3, "full": 5}
CANVAS, CROP = 24, 16
DIM, HIDDEN, SLOTS = 32, 64, 16
CHANNELS: dict[Size, int] = {"smoke": 16, "small": 32, "full": 64}
BATCH: dict[Size, int] = {"smoke": 32, "small": 32, "full": 64}
LEARNING_RATE = 1e-3
IMAGES: dict[Size, tuple[int, int]] = {"smoke": (32, 24), "small": (1200, 200), "full": (1200, 300)}
STEPS: dict[Size, int] = {"smoke": 3, "small": 600, "full": 2400}

SLOTCON, UNCENTERED = "SlotCon", "SlotCon without centering"
UNTRAINED, IMAGE_LEVEL = "untrained", "image-level contrast, k-means"
UNTRAINED_KMEANS = "untrained, k-means"
STRANGERS = "SlotCon, views of two images"
ARMS = (SLOTCON, UNTRAINED, UNTRAINED_KMEANS, IMAGE_LEVEL, UNCENTERED, STRANGERS)


class StrangeCrops(TwoCrops):
    """The second crop shows another image of the batch."""

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator | None = None
    ) -> tuple[View, View]:
        first, second = super().__call__(images, generator)
        return first, second._replace(x=second.x.roll(1, 0))


class Canvases(NamedTuple):
    """Images, the region of each pixel (0: background), and the class of each digit (-1: there is none)."""

    x: Float[Tensor, "images 1 height width"]
    region: Int[Tensor, "images height width"]
    classes: Int[Tensor, "images digits"]


class Measured(NamedTuple):
    """What one network's groups are worth."""

    ari: float
    foreground: float
    active: float
    entropy: float
    from_slot: float
    from_mean: float


@study
def run(seed: int, size: Size) -> Findings:
    """Train each arm once per seed on the same canvases; compare groups with regions on fresh ones."""
    seeds = seeds_of(seed, size, **SEEDS)
    found: dict[str, list[Measured]] = {name: [] for name in ARMS}
    losses: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    trained_on, tested_on = IMAGES[size]
    for s in seeds:
        train = canvases(digits("train"), trained_on, torch.Generator().manual_seed(s))
        test = canvases(digits("test"), tested_on, torch.Generator().manual_seed(s + 1000))
        for name, runs in found.items():
            torch.manual_seed(s)
            model, curve = _trained(name, train.x, size, s)
            runs.append(measure(model, test))
            losses[name].append(curve)
    arms = {
        field: Arms({name: tuple(getattr(m, field) for m in runs) for name, runs in found.items()})
        for field in Measured._fields
    }

    def rule(arm: str) -> tuple[Check, ...]:
        gain = arms["ari"].minus(arm, UNTRAINED)
        return (
            above(f"ARI with the true regions, {arm} minus untrained", gain, 0.1, 0.0),
            above(f"prototypes in use, {arm}", arms["active"][arm], 3.5),
            above(f"entropy of the mean assignment, nats, {arm}", arms["entropy"][arm], 1.0),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, SLOTCON, knocked_out=(STRANGERS, UNTRAINED)),),
        gates=(
            # groups that have nothing to do with the regions have an index of 0
            gate(SLOTCON, above("ARI with the true regions", arms["ari"][SLOTCON], 0.0), losses[SLOTCON]),
            gate(STRANGERS, None, losses[STRANGERS]),
            gate(UNTRAINED, None, None),
        ),
        checks=(
            above(
                "prototypes in use, SlotCon minus without centering",
                arms["active"].minus(SLOTCON, UNCENTERED),
                0.0,
                in_rule=False,
            ),
            above(
                "ARI, SlotCon minus image-level contrast", arms["ari"].minus(SLOTCON, IMAGE_LEVEL), 0.0, in_rule=False
            ),
            above(
                "digit from its slot minus digit from the mean of the image, SlotCon",
                [a - b for a, b in zip(arms["from_slot"][SLOTCON], arms["from_mean"][SLOTCON], strict=True)],
                0.0,
                in_rule=False,
            ),
        ),
        table=[
            row
            for field, metric in (
                ("ari", "ARI with background and each digit"),
                ("foreground", "ARI with background against digits"),
                ("active", "prototypes in use"),
                ("entropy", "entropy of the mean assignment, nats"),
                ("from_slot", "3-NN accuracy of a digit from its slot"),
                ("from_mean", "3-NN accuracy of a digit from the image's mean"),
            )
            for row in arms[field].table(metric)
        ],
        figure=partial(_draw, ari=arms["ari"], active=arms["active"]),
        notes=(
            f"Encoder of 4 convolutions with {CHANNELS[size]} channels, maps of 12 x 12; {SLOTS} prototypes of width "
            f"{DIM}; crops of {CROP} x {CROP} pixels, flips, brightness; {STEPS[size]:,} steps of {BATCH[size]} images, Adam "
            f"at {LEARNING_RATE:g}. Groups are the best prototype of each place, enlarged to the pixels.",
            "A prototype is in use where it is the best of at least 1 % of all places of the test images.",
            "The image-level arm trains encoder and projector by contrast of the mean features of two crops (InfoNCE at 0.2). "
            "It has no prototypes: they are found by k-means among its normalised features of the training images, and so "
            "are those of the second untrained arm; the first has the random ones it starts from.",
            "Nearest neighbours are digits of other test images; the slot is that whose prototype is the "
            "best of most of a digit's pixels. An image shows two or three digits, so that its mean cannot say which is meant.",
        ),
    )


def canvases(source: Digits, count: int, generator: torch.Generator) -> Canvases:
    """Two or three digits of different classes, in cells of a 3 x 3 grid, on a striped background.

    >>> made = canvases(digits("test"), 3, torch.Generator().manual_seed(0))
    >>> made.x.shape, made.region.max().item() <= 3
    (torch.Size([3, 1, 24, 24]), True)
    """
    lines = torch.arange(CANVAS, dtype=torch.float32)
    angle = torch.rand(count, 1, 1, generator=generator) * torch.pi
    phase = torch.rand(count, 1, 1, generator=generator) * 2 * torch.pi
    wave = torch.sin(1.5 * (angle.cos() * lines + angle.sin() * lines.unsqueeze(1)) + phase)
    x = 0.2 + 0.15 * wave + 0.05 * torch.randn(count, CANVAS, CANVAS, generator=generator)
    region = torch.zeros(count, CANVAS, CANVAS, dtype=torch.long)
    classes = torch.full((count, 3), -1)
    images = source.x.view(-1, 8, 8)
    for i in range(count):
        wanted = 2 + int(torch.randint(2, (), generator=generator))
        labels = torch.randperm(10, generator=generator)[:wanted]
        cells = torch.randperm(9, generator=generator)[:wanted]
        for j, (label, cell) in enumerate(zip(labels.tolist(), cells.tolist(), strict=True)):
            of_class = (source.y == label).nonzero().squeeze(1)
            chosen = images[of_class[int(torch.randint(len(of_class), (), generator=generator))]]
            top, left = 8 * (cell // 3), 8 * (cell % 3)
            place = (i, slice(top, top + 8), slice(left, left + 8))
            ink = chosen > 0.25
            x[place] = torch.where(ink, 0.2 + 0.8 * chosen, x[place])
            region[place] = torch.where(ink, j + 1, region[place])
            classes[i, j] = label
    return Canvases(x.unsqueeze(1), region, classes)


@torch.no_grad()
def measure(model: SlotCon, data: Canvases) -> Measured:
    """Compare the teacher's groups with the regions of the images."""
    from sklearn.metrics import adjusted_rand_score

    model.eval()
    slots, dots = model.teach(data.x)
    groups = F.interpolate(dots, size=(CANVAS, CANVAS), mode="nearest").argmax(1)
    pairs = list(zip(data.region.flatten(1).numpy(), groups.flatten(1).numpy(), strict=True))
    ari = [adjusted_rand_score(region, group) for region, group in pairs]
    foreground = [adjusted_rand_score(region > 0, group) for region, group in pairs]
    share = torch.bincount(dots.argmax(1).flatten(), minlength=SLOTS) / dots[:, 0].numel()
    mean = (dots / model.teacher_temp).softmax(1).mean((0, 2, 3))
    from_slot, from_mean, labels, owners = [], [], [], []
    features = model.teacher[1](model.teacher[0](data.x)).mean((2, 3))
    for i in range(len(data.x)):
        for j in range(3):
            if data.classes[i, j] < 0:
                continue
            best = groups[i][data.region[i] == j + 1].mode().values
            from_slot.append(slots[i, best])
            from_mean.append(features[i])
            labels.append(int(data.classes[i, j]))
            owners.append(i)
    y, owner = torch.tensor(labels), torch.tensor(owners)
    return Measured(
        float(sum(ari) / len(ari)),
        float(sum(foreground) / len(foreground)),
        float((share >= 0.01).sum()),
        float(-(mean * mean.clamp(min=1e-12).log()).sum()),
        neighbours_right(torch.stack(from_slot), y, owner),
        neighbours_right(torch.stack(from_mean), y, owner),
    )


def neighbours_right(
    x: Float[Tensor, "items dim"], y: Int[Tensor, "items"], image: Int[Tensor, "items"], k: int = 3
) -> float:
    """Share of items whose class most of their `k` nearest items of other images share, by cosine.

    Digits of one image have its mean in common and differ in class: as neighbours they would count against the mean.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> neighbours_right(x, torch.tensor([0, 0, 1, 1]), torch.arange(4), k=1)
    1.0
    >>> neighbours_right(x, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), k=1)
    0.5
    """
    alike = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T
    nearest = alike.masked_fill(image.unsqueeze(1) == image, -2).topk(k).indices
    return float((y[nearest].mode(1).values == y).double().mean())


def _trained(
    name: str, images: Float[Tensor, "images 1 height width"], size: Size, seed: int
) -> tuple[SlotCon, list[float]]:
    """A model, and its losses step by step."""
    center_momentum = 1.0 if name == UNCENTERED else 0.9
    channels = CHANNELS[size]
    model = SlotCon(_encoder(channels), channels, SLOTS, DIM, HIDDEN, center_momentum=center_momentum)
    crops = StrangeCrops if name == STRANGERS else TwoCrops
    views = crops(CROP, scale=((CROP / CANVAS) ** 2,) * 2, ratio=(1.0, 1.0), least_overlap=0.2, augment=_brightness)
    batches = _Batches(images, BATCH[size], seed)
    losses: list[float] = []
    if name in (SLOTCON, UNCENTERED, STRANGERS):
        trainer = SlotConTrainer(model, views, STEPS[size], optimizer=partial(Adam, lr=LEARNING_RATE))
        losses = trainer.fit(batches)
    elif name == IMAGE_LEVEL:
        _contrast_images(model, views, batches, STEPS[size])
    else:
        # seen once, so that the running statistics of its BatchNorms are those of the data
        model.train()
        with torch.no_grad():
            for part in images.split(BATCH[size]):
                model(*views(part))
    if name in (IMAGE_LEVEL, UNTRAINED_KMEANS):
        _find_prototypes(model, images, seed)
    return model, losses


@torch.no_grad()
def _find_prototypes(model: SlotCon, images: Float[Tensor, "images 1 height width"], seed: int) -> None:
    from sklearn.cluster import KMeans

    model.eval()
    encoder, projector, grouping = model.teacher
    assert isinstance(grouping, SemanticGrouping)
    features = F.normalize(projector(encoder(images[:200])), dim=1).movedim(1, -1).flatten(0, 2)
    found = KMeans(SLOTS, n_init=1, random_state=seed).fit(features.numpy())
    grouping.slot_embed.copy_(torch.from_numpy(found.cluster_centers_))


def _encoder(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (channels, stride) in enumerate(((1, 1), (width, 2), (width, 1), (width, 1))):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()] if i < 3 else []
    return nn.Sequential(*layers)


class _Batches:
    """The images in a fresh order in every pass."""

    def __init__(self, images: Float[Tensor, "images 1 height width"], batch: int, seed: int) -> None:
        self.images = images
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.images), generator=self.generator)
        return (self.images[chosen] for chosen in order.split(self.batch) if len(chosen) == self.batch)


def _brightness(x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
    gain, shift = 0.6 + 0.8 * torch.rand(len(x), 1, 1, 1), 0.2 * torch.rand(len(x), 1, 1, 1) - 0.1
    return gain * x + shift


def _contrast_images(model: SlotCon, views: TwoCrops, batches: _Batches, steps: int, tau: float = 0.2) -> None:
    """Two crops of an image are alike in their mean features, those of different images are not."""
    model.train()

    def loss(images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, ""]:
        a, b = (F.normalize(model.projector(model.encoder(v.x)).mean((2, 3)), dim=-1) for v in views(images))
        logits = a @ b.T / tau
        own = torch.arange(len(images))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    trained = [*model.encoder.parameters(), *model.projector.parameters()]
    descend(trained, map(loss, itertools.islice(endless, steps)), steps, LEARNING_RATE)
    # what is measured is the teacher
    for ours, theirs in zip((model.encoder, model.projector), model.teacher, strict=False):
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))


def _draw(figure: Any, ari: Arms, active: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, ari, "adjusted Rand index of groups and regions")
    draw_arms(right, active, "prototypes in use")
