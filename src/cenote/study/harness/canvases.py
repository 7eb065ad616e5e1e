"""Canvases of coloured shapes, questions about them, and a small LLaVA that answers them.

Four objects of 2 x 2 patches stand on 8 x 8: each of four shapes once, in a colour, on a ground that says nothing. The question
is one word, the shape, behind the image; the answer is its colour.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.seeded import seeded

SHAPES, GROUNDS, COLOURS = 4, 4, 6
CELLS, PATCH = 8, 8
IMAGE, FIRST_SHAPE, FIRST_COLOUR = 1, 2, 6
TRAIN, TEST, BATCH, STEPS, RATE = 2048, 256, 32, 400, 3e-3
WIDTH, NEURONS, BLOCKS, HEADS = 64, 192, 4, 4
VISION_WIDTH, VISION_BLOCKS = 64, 2
CHANCE = 1 / COLOURS
STACK = "model.language_model.layers"


class Canvases(NamedTuple):
    """Pixels, prompts (image tokens, a shape), numbers of the colours asked for, the patches of the object, and the colours of
    all shapes."""

    pixels: Float[Tensor, "items 3 side side"]
    words: Int[Tensor, "items tokens"]
    colours: Int[Tensor, "items"]
    asked: Bool[Tensor, "items patches"]
    of_shapes: Int[Tensor, "items shapes"]

    @property
    def image(self) -> Bool[Tensor, "items tokens"]:
        """Where the image tokens are."""
        return self.words == IMAGE


def _glyphs() -> Float[Tensor, "shapes height width"]:
    y, x = torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")
    middle = (PATCH - 1) / 2
    ring = ((x - middle) ** 2 + (y - middle) ** 2 - 6).abs() < 5
    return torch.stack([ring, (x - y).abs() < 2, (x - middle).abs() < 1.5, (y - middle).abs() < 1.5]).float()


def canvases(count: int, seed: int) -> Canvases:
    """Drawn from a seed."""
    draw = np.random.default_rng(seed)
    glyphs = _glyphs()
    palette = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]).float()
    side = CELLS * PATCH
    pixels = torch.zeros(count, 3, side, side)
    words = torch.full((count, CELLS * CELLS + 1), IMAGE)
    colours = torch.zeros(count, dtype=torch.long)
    asked = torch.zeros(count, CELLS, CELLS, dtype=torch.bool)
    of_shapes = torch.zeros(count, SHAPES, dtype=torch.long)
    for i in range(count):
        grounds = draw.integers(GROUNDS, size=SHAPES)
        blocks = draw.choice((CELLS // 2) ** 2, SHAPES, replace=False)
        chosen = int(draw.integers(SHAPES))
        of_shapes[i] = torch.from_numpy(draw.integers(COLOURS, size=SHAPES))
        for shape, (block, ground) in enumerate(zip(blocks, grounds, strict=True)):
            colour = int(of_shapes[i, shape])
            one = 0.25 * (ground + 1) * torch.ones(3, PATCH, PATCH) * (1 - glyphs[shape])
            one = one + palette[colour][:, None, None] * glyphs[shape]
            y, x = 2 * PATCH * (block // (CELLS // 2)), 2 * PATCH * (block % (CELLS // 2))
            pixels[i, :, y : y + 2 * PATCH, x : x + 2 * PATCH] = one.repeat(1, 2, 2)
            if shape == chosen:
                words[i, -1] = FIRST_SHAPE + shape
                colours[i] = colour
                asked[i, y // PATCH : y // PATCH + 2, x // PATCH : x // PATCH + 2] = True
    noise = torch.from_numpy(draw.normal(size=tuple(pixels.shape))).float()
    return Canvases(pixels + 0.05 * noise, words, colours, asked.flatten(1), of_shapes)


def small_llava(seed: int) -> Any:
    """Untrained: a CLIP of two blocks, a projector with a GELU, a Llama of four."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=2 * VISION_WIDTH, num_hidden_layers=VISION_BLOCKS,
        num_attention_heads=4, image_size=CELLS * PATCH, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=FIRST_COLOUR + COLOURS, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, pad_token_id=0,
    )  # fmt: skip
    settings: dict[str, Any] = {"image_token_id": IMAGE, "vision_feature_layer": -1}
    config = LlavaConfig(vision_config=vision, text_config=text, **settings)
    with seeded(seed):
        return LlavaForConditionalGeneration(config)


class Trained(NamedTuple):
    """A model that answers, and its losses, one per step."""

    model: Any
    losses: list[float]


def trained(seed: int, steps: int = STEPS, items: int = TRAIN) -> Trained:
    """Projector and language model trained to answer; the vision tower stays as it was drawn. All shapes of a canvas are
    asked for at once, by questions that do not see each other."""
    model = small_llava(seed)
    data = canvases(items, seed)
    with torch.no_grad():
        seen = torch.cat([features(model, some) for some in data.pixels.split(256)])
    parts = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    parameters = [p for part in parts for p in part.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    may, positions = _questions()
    questions = torch.arange(FIRST_SHAPE, FIRST_SHAPE + SHAPES).expand(BATCH, -1)
    losses = []
    for _ in range(steps):
        some = torch.randint(items, (BATCH,), generator=order)
        words = model.get_input_embeddings()(questions)
        given = torch.cat([model.model.multi_modal_projector(seen[some]), words], 1)
        told = {"attention_mask": may.expand(BATCH, -1, -1, -1), "position_ids": positions, "use_cache": False}
        states = model.model.language_model(inputs_embeds=given, **told).last_hidden_state[:, -SHAPES:]
        logits = model.lm_head(states)[..., FIRST_COLOUR:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data.of_shapes[some].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return Trained(model.eval(), losses)


def _questions() -> tuple[Bool[Tensor, "1 1 tokens tokens"], Int[Tensor, "1 tokens"]]:
    """Which tokens each reads, and where it stands, behind one image."""
    patches = CELLS * CELLS
    question = torch.cat([torch.full((patches,), -1), torch.arange(SHAPES)])
    same = (question[:, None] == question) | (question == -1)
    positions = torch.arange(patches + SHAPES).clamp(max=patches)
    return (same & torch.ones_like(same).tril())[None, None], positions[None]


def features(model: Any, pixels: Float[Tensor, "items 3 side side"]) -> Float[Tensor, "items patches dim"]:
    """What the projector reads."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[-1][:, 1:]


@torch.no_grad()
def colour_logits(model: Any, data: Canvases) -> Float[Tensor, "items colours"]:
    """What the model says of each colour."""
    given = {"input_ids": data.words, "pixel_values": data.pixels}
    return model(**given, use_cache=False).logits[:, -1, FIRST_COLOUR:]
