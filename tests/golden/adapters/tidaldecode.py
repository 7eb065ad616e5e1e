import torch
from torch import Tensor

from cenote.core.grouped import attend
from cenote.mix.tidaldecode.policy import TidalDecode, attend_selected
from cenote.models.live.reading import Held, Layout
from tests.golden.cases import Case, adapter


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    width = x.shape[-1]
    angles = positions.to(x.dtype)[:, None] / base ** (torch.arange(0, width, 2, dtype=x.dtype) / width)
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return x * cos + half * sin


@adapter("tidaldecode", "llama_tidal_attention_forward")
def layers(case: Case) -> dict[str, Tensor]:
    config = case.config
    heads, kv_heads, width = config["num_heads"], config["num_key_value_heads"], config["head_dim"]
    count = config["layers"]
    policy = TidalDecode(config["top_k"], config["sparse_layer_start"], config["correction_layer"])
    # theirs name layers that a model may not have, and then choose once
    policy.correction = tuple(layer for layer in policy.correction if layer < count)
    kept: list[tuple[Tensor, Tensor]] = []

    def projected(layer: int, name: str, x: Tensor, of: int) -> Tensor:
        return (x @ case.params[f"layers.{layer}.{name}.weight"].T).unflatten(-1, (of, width)).transpose(1, 2)

    steps = case.inputs["decode_in"]
    total = case.inputs["prompt"].shape[1] + sum(step.shape[1] for step in steps)
    selected = torch.full((len(steps), count, heads, total), 2, dtype=torch.uint8)

    def forward(h: Tensor, step: int | None) -> Tensor:
        state = policy.begin(Layout(count, heads, kv_heads, width))
        for layer in range(count):
            before = kept[layer][0].shape[2] if step is not None else 0
            positions = torch.arange(before, before + h.shape[1])
            q = rotated(projected(layer, "q_proj", h, heads), positions, config["rope_base"])
            k = rotated(projected(layer, "k_proj", h, kv_heads), positions, config["rope_base"])
            v = projected(layer, "v_proj", h, kv_heads)
            if step is None:
                kept.append((k, v))
            else:
                k, v = (torch.cat(pair, 2) for pair in zip(kept[layer], (k, v), strict=True))
                kept[layer] = (k, v)
            causal = torch.arange(k.shape[2]) <= positions[:, None]
            y = attend(q, k, v, readable=causal[None, None])
            if step is not None and layer >= policy.start:
                mask = policy.choose(layer, q, Held(k, v, width**-0.5, seen=k.shape[2]), state)
                chosen = causal.expand(len(q), heads, -1, -1) if state.mask is None else state.mask
                selected[step, layer] = 0
                selected[step, layer, :, : k.shape[2]] = chosen[0, :, -1]
                if mask is not None:
                    low = torch.zeros_like(causal, dtype=q.dtype).masked_fill(~causal, torch.finfo(q.dtype).min)
                    y = attend_selected(q, k, v, mask, low[None, None])
            h = h + y.transpose(1, 2).flatten(2) @ case.params[f"layers.{layer}.o_proj.weight"].T
        return h

    prefill = forward(case.inputs["prompt"], None)
    decoded = [forward(x, i) for i, x in enumerate(steps)]
    return {"prefill_out": prefill, "decode_out": torch.stack(decoded), "selected": selected}
