from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.explain.concept_attention.attention import Reads, concept_rows, heat_maps, similarities
from cenote.models.concept_streams import Seen, TextSide, looking_on
from tests.golden.cases import Case, adapter

READS: dict[tuple[bool, bool], Reads] = {
    (True, True): "both",
    (True, False): "image",
    (False, True): "concepts",
    (False, False): "none",
}


class Conditions(nn.Module):
    """Of the image, and of a pooled prompt of zeros."""

    def __init__(self, image: Tensor, concepts: Tensor) -> None:
        super().__init__()
        self.image, self.concepts = image, concepts

    def forward(self, pooled: Tensor) -> Tensor:
        return self.image if bool(pooled.any()) else self.concepts


class OneBlock(nn.Module):
    """A transformer of one block with two streams."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from diffusers.models.attention import FeedForward
        from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformerBlock

        config, width = case.config, case.config["hidden_size"]
        block = FluxTransformerBlock(width, config["num_heads"], width // config["num_heads"])
        inner = int(width * config["mlp_ratio"])
        for name in ("ff", "ff_context"):
            setattr(block, name, FeedForward(width, width, inner_dim=inner, activation_fn="gelu-approximate"))
        block.load_state_dict(_renamed(case.params, width))
        self.transformer_blocks = nn.ModuleList([block])
        self.positions = FluxPosEmbed(config["rope_theta"], config["rope_axes_dim"])
        self.time_text_embed = Conditions(case.inputs["vec"], case.inputs["concept_vec"])
        self.context_embedder = nn.Linear(width, width)
        nn.init.eye_(self.context_embedder.weight)
        nn.init.zeros_(self.context_embedder.bias)

    def forward(self, image: Tensor, text: Tensor, ids: Tensor) -> Any:
        condition = self.time_text_embed(torch.ones(1))
        places = self.positions(torch.cat([torch.zeros(text.shape[1], ids.shape[-1]), ids]))
        return self.transformer_blocks[0](image, text, condition, places)


@adapter("concept-attention", "concept_attention.flux.dit_block.ModifiedDoubleStreamBlock")
@torch.no_grad()
def block(case: Case) -> dict[str, Tensor]:
    pytest.importorskip("diffusers", reason="cenote[diffusers] is not installed")
    model, concepts = OneBlock(case).eval(), case.inputs["concepts"]
    options = case.config.get("joint_attention_kwargs") or {}
    reads = READS[options.get("concept_cross_attention", True), options.get("concept_self_attention", True)]
    found: list[tuple[Seen, Tensor]] = []

    def look(seen: Seen) -> Tensor:
        y = concept_rows(seen.q, seen.k, seen.v, seen.image_k, seen.image_v, reads)
        found.append((seen, y))
        return y

    with looking_on(model, concepts, look):
        text, image = model(case.inputs["img"], case.inputs["txt"], case.inputs["img_ids"][0])
    ((seen, y),) = found
    side = TextSide(model.transformer_blocks[0])
    _, rest = side.enter(concepts, case.inputs["concept_vec"])
    scores = similarities(y, seen.image_y)
    return {
        "img_out": image,
        "txt_out": text,
        "concepts_out": side.leave(concepts, y, rest),
        "concept_scores": scores,
        "heatmap_softmax": heat_maps([scores]),
        "output_space_concept": y.transpose(1, 2).flatten(2),
        "output_space_image": seen.image_y.transpose(1, 2).flatten(2),
    }


def _renamed(params: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for theirs, suffix, added, out in (
        ("img", "", "to_{}", "to_out.0"),
        ("txt", "_context", "add_{}_proj", "to_add_out"),
    ):
        own = {k.removeprefix(f"{theirs}_"): v for k, v in params.items() if k.startswith(f"{theirs}_")}
        for part in ("weight", "bias"):
            found[f"norm1{suffix}.linear.{part}"] = own[f"mod.lin.{part}"]
            joint = own.get(f"attn.qkv.{part}", torch.zeros(3 * width))
            for letter, value in zip("qkv", joint.chunk(3), strict=True):
                found[f"attn.{added.format(letter)}.{part}"] = value
            found[f"attn.{out}.{part}"] = own[f"attn.proj.{part}"]
            found[f"ff{suffix}.net.0.proj.{part}"] = own[f"mlp.0.{part}"]
            found[f"ff{suffix}.net.2.{part}"] = own[f"mlp.2.{part}"]
        of_query, of_key = ("norm_q", "norm_k") if theirs == "img" else ("norm_added_q", "norm_added_k")
        found[f"attn.{of_query}.weight"] = own["attn.norm.query_norm.scale"]
        found[f"attn.{of_key}.weight"] = own["attn.norm.key_norm.scale"]
    return found
