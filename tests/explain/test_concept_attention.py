from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import ConceptAttention, concept_rows, heat_maps
from cenote.explain.concept_attention import attention, segmentation
from cenote.models.concept_streams import Seen, looking_on, words_encoded
from cenote.models.live import recorded
from cenote.testing.as_found import AsFound
from tests.models.live import zoo

PIXELS, PROMPT = 6, 3


def flux(blocks: int = 3, singles: int = 1, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = zoo.diffusers().FluxTransformer2DModel(
        in_channels=4, num_layers=blocks, num_single_layers=singles, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(4, 4, 8),
    ).eval().to(dtype)  # fmt: skip
    rows = torch.arange(PIXELS)
    inputs = {
        "hidden_states": torch.randn(2, PIXELS, 4).to(dtype), "encoder_hidden_states": torch.randn(2, PROMPT, 12).to(dtype),
        "pooled_projections": torch.randn(2, 6).to(dtype), "timestep": torch.tensor([0.5, 0.2]).to(dtype),
        "img_ids": torch.stack([0 * rows, rows // 3, rows % 3], 1).to(dtype), "txt_ids": torch.zeros(PROMPT, 3).to(dtype),
    }  # fmt: skip
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = zoo.diffusers().SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, PROMPT, 12),
        "pooled_projections": torch.randn(2, 6), "timestep": torch.tensor([5, 3]),
    }  # fmt: skip
    return model, inputs


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {"flux": flux, "sd3": sd3}


def words(count: int = 4, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(1, count, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seen_by(model: nn.Module, inputs: dict[str, Tensor], concepts: Tensor, **options: Any) -> Any:
    with torch.no_grad(), ConceptAttention(**options).on(model, concepts) as found:
        model(**inputs)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_runs_as_it_would_and_is_as_it_was(kind: str) -> None:
    model, inputs = MODELS[kind]()
    with torch.no_grad():
        plain = model(**inputs)[0]
        found = AsFound(model, lambda: model(**inputs))
        with ConceptAttention().on(model, words()) as seen:
            watched = model(**inputs)[0]
    assert torch.equal(plain, watched)
    assert found.changed() is None
    assert len(seen.scores) == 3
    maps = seen.maps()
    assert maps.shape == (2, 4, 16 if kind == "sd3" else PIXELS)
    assert torch.allclose(maps.sum(1), torch.ones_like(maps[:, 0]))
    assert not maps.requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_fails_is_as_it_was(kind: str) -> None:
    model, inputs = MODELS[kind]()
    found = AsFound(model, lambda: model(**inputs))
    with pytest.raises(AttributeError), torch.no_grad(), ConceptAttention().on(model, words()):
        model(**{**inputs, "timestep": None})
    assert found.changed() is None


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_of_the_image_are_those_of_its_heads(kind: str) -> None:
    model, inputs = MODELS[kind]()
    held: list[Seen] = []

    def look(seen: Seen) -> Tensor:
        held.append(seen)
        return seen.v

    with torch.no_grad(), recorded(model, "heads", "rows", rows="all") as found, looking_on(model, words(), look):
        model(**inputs)
    for seen in held:
        (heads,), (rows,) = found["heads"][seen.place], found["rows"][seen.place]
        pixels = seen.image_y.shape[2]
        image = slice(0, pixels) if kind == "sd3" else slice(PROMPT, None)
        prompt = slice(pixels, None) if kind == "sd3" else slice(0, PROMPT)
        assert torch.equal(
            seen.image_y, heads.transpose(1, 2)[:, :, image] if heads.shape[1] != 2 else heads[:, :, image]
        )
        assert torch.allclose(seen.prompt_to_image, rows[:, :, prompt, image].mean(1), atol=1e-6)


def test_concept_rows_are_those_of_the_joint_attention() -> None:
    q, k, v, qx, kx, vx = (
        torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 4, 4, 7, 7, 7)
    )
    joint = nn.functional.scaled_dot_product_attention(
        torch.cat([q, qx], 2), torch.cat([k, kx], 2), torch.cat([v, vx], 2)
    )[:, :, :4]
    assert torch.allclose(concept_rows(q, k, v, kx, vx), joint, atol=1e-6)
    of_image = nn.functional.scaled_dot_product_attention(q, kx, vx)
    assert torch.allclose(concept_rows(q, k, v, kx, vx, "image"), of_image, atol=1e-6)
    among = nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(concept_rows(q, k, v, kx, vx, "concepts"), among, atol=1e-6)
    assert torch.equal(concept_rows(q, k, v, kx, vx, "none"), v)


def test_no_concepts_are_the_model_alone() -> None:
    model, inputs = flux()
    with torch.no_grad():
        plain = model(**inputs)[0]
        with ConceptAttention().on(model, words(0)) as seen:
            assert torch.equal(model(**inputs)[0], plain)
    assert not seen.scores
    with pytest.raises(InputError, match="nothing was seen there; the blocks that were: none"):
        seen.maps()


def test_one_concept_has_a_map_of_ones() -> None:
    assert torch.equal(seen_by(*flux(), words(1)).maps(), torch.ones(2, 1, PIXELS))


def test_equal_concepts_have_equal_maps() -> None:
    concepts = words(3)
    concepts[:, 2] = concepts[:, 0]
    maps = seen_by(*flux(), concepts).maps()
    assert torch.allclose(maps[:, 0], maps[:, 2], atol=1e-6)


def test_permuting_concepts_permutes_maps() -> None:
    order = torch.tensor([2, 0, 3, 1])
    plain, moved = (seen_by(*flux(), x).maps() for x in (words(), words()[:, order]))
    assert torch.allclose(plain[:, order], moved, atol=1e-6)


def test_items_do_not_see_each_other() -> None:
    model, inputs = flux()
    both = seen_by(model, inputs, words()).maps()
    alone = {n: v[1:] if len(v) == 2 else v for n, v in inputs.items()}
    assert torch.allclose(both[1:], seen_by(model, alone, words()).maps(), atol=1e-6)


def test_half_precision_is_finite() -> None:
    maps = seen_by(*flux(dtype=torch.bfloat16), words(dtype=torch.bfloat16)).maps()
    assert maps.dtype == torch.bfloat16
    assert bool(maps.isfinite().all())


def test_no_gradient_is_kept() -> None:
    model, inputs = flux()
    with ConceptAttention().on(model, words()) as seen:
        model(**inputs)
    assert not any(s.requires_grad for s in seen.scores.values())


@pytest.mark.parametrize("space", ["output", "cross", "cross keys", "value"])
@pytest.mark.parametrize("reads", ["both", "image", "concepts", "none"])
def test_spaces_and_what_concepts_read(space: str, reads: str) -> None:
    seen = seen_by(*flux(), words(), space=space, reads=reads)
    assert seen.maps((2, 3)).shape == (2, 4, 2, 3)
    assert bool(seen.maps().isfinite().all())
    other = seen_by(*flux(), words(), space="output", reads="both")
    if (space, reads) != ("output", "both"):
        assert not torch.equal(seen.scores[0, 2], other.scores[0, 2])


def test_steps_and_blocks_of_a_loop_are_chosen() -> None:
    model, inputs = flux(blocks=5)
    with torch.no_grad(), ConceptAttention().on(model, words()) as seen:
        for t in (0.9, 0.5):
            model(**{**inputs, "timestep": torch.full((2,), t)})
    assert sorted(seen.scores) == [(step, block) for step in (0, 1) for block in range(5)]
    late = heat_maps([seen.scores[1, b] for b in (1, 2, 3, 4)])
    assert torch.equal(seen.maps(steps=[1]), late)
    assert torch.equal(seen.maps(blocks=[3], steps=[0]), seen.scores[0, 3].softmax(1))
    alone = seen_by(model, {**inputs, "timestep": torch.full((2,), 0.5)}, words())
    assert torch.allclose(alone.scores[0, 4], seen.scores[1, 4], atol=1e-6)
    assert seen.prompt_maps().shape == (2, PROMPT, PIXELS)


def test_both_orders_of_the_softmax() -> None:
    scores = torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(heat_maps(scores), scores.softmax(2).mean(0))
    assert torch.allclose(heat_maps(scores, "after mean", 2.0), (scores.mean(0) / 2).softmax(1))


def test_masks_segments_and_background() -> None:
    maps = torch.tensor([[[0.7, 0.2, 0.1, 0.2], [0.2, 0.6, 0.2, 0.2], [0.1, 0.2, 0.7, 0.6]]])
    assert attention.segmented(maps).tolist() == [[0, 1, 2, 2]]
    assert attention.segmented(maps, 1).tolist() == [[0, 1, -1, -1]]
    assert attention.over_its_mean(maps)[0].tolist() == [
        [True, False, False, False], [False, True, False, False], [False, False, True, True]
    ]  # fmt: skip
    assert torch.allclose(attention.objectness(maps), torch.full((1, 4), 1 / 3))


def test_measures_by_hand() -> None:
    scores, true = torch.tensor([[0.9, 0.8, 0.3, 0.1]]), torch.tensor([[True, False, True, False]])
    assert segmentation.auc(scores, true).item() == pytest.approx(0.75)
    assert segmentation.average_precision(scores, true).item() == pytest.approx((1 + 2 / 3) / 2)
    masks = attention.over_its_mean(scores)
    assert segmentation.pixel_accuracy(masks, true).item() == 0.5
    assert segmentation.mean_iou(masks, true).item() == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="true: a word has no pixel"):
        segmentation.auc(scores, torch.zeros(1, 4, dtype=torch.bool))


def test_words_are_encoded_by_themselves() -> None:
    library = zoo.tiny.transformers()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    rules = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "grass": 4, "sky": 5}, unk_token="<unk>")
    )
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = library.PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    encoder = library.T5EncoderModel(
        library.T5Config(vocab_size=6, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    found = words_encoded(["cat", "grass sky"], tokenizer, encoder)
    alone = encoder(torch.tensor([[4, 5, 1]])).last_hidden_state[0]
    assert found.shape == (1, 2, 12)
    assert torch.allclose(found[0, 1], alone[0], atol=1e-6)
    assert torch.equal(found[0, 0], words_encoded(["cat"], tokenizer, encoder)[0, 0])
    mean = words_encoded(["grass sky"], tokenizer, encoder, mean=True)
    assert torch.allclose(mean[0, 0], alone[:2].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seen_by(nn.Linear(2, 2), {}, words()), "model: Linear has no time_text_embed"),
        (lambda: seen_by(*flux(), torch.randn(1, 2, 5)), "tokens: expected width 12, as of the prompt, got 5"),
        (lambda: seen_by(*flux(), words().expand(3, -1, -1)), "tokens: expected those of one item"),
        (lambda: ConceptAttention(space="query"), "space: expected 'output'"),
        (lambda: ConceptAttention(reads="prompt"), "reads: expected 'both'"),
        (lambda: heat_maps([]), "scores: expected those of at least one layer"),
        (lambda: attention.segmented(torch.rand(1, 2, 3), 2), "background: expected fewer than 2 concepts"),
        (
            lambda: concept_rows(*(torch.rand(1, 2, 3, 4),) * 3, *(torch.rand(2, 2, 3, 4),) * 2),
            "q: expected concepts of 2 items as the image, got 1",
        ),
    ],
)
def test_what_cannot_be_used_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
