from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.pools import features, shaken
from torch import Tensor, nn

from cenote import InputError
from cenote.pool import TokenCountSampler, TokenFlex, check_placeholders, expand_placeholders
from cenote.pool.spatial.tokenflex import as_map


class Bare(TokenFlex):
    """The pooling alone: the gated map is taken out."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        self.gate_proj = self.up_proj = self.down_proj = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor, num_tokens: Any = None) -> Tensor:
        y = super().forward(x, num_tokens)
        # invert silu(z) * z on the positive side, where it rises
        z = y.sqrt() + 0.5
        for _ in range(60):
            f = F.silu(z) * z - y
            s = torch.sigmoid(z)
            z = z - f / (2 * z * s + z.square() * s * (1 - s))
        return z


def positive(cells: int = 16, dim: int = 3) -> Tensor:
    return features(tokens=cells, dim=dim).abs() + 0.5


def test_pooling_alone_finer_to_coarser() -> None:
    x = positive(36)
    maps = as_map(x, 3)
    torch.testing.assert_close(Bare(3)(x, 36), x)
    torch.testing.assert_close(Bare(3)(x, 1), x.mean(1, keepdim=True))
    for n in (2, 3):
        expected = F.avg_pool2d(maps, 6 // n).flatten(2).transpose(1, 2)
        torch.testing.assert_close(Bare(3)(x, n * n), expected)


def test_bins_overlap_where_the_grid_does_not_divide() -> None:
    x = positive(25)
    maps, n = as_map(x, 3), 3
    bins = [(i * 5 // n, -(-(i + 1) * 5 // n)) for i in range(n)]
    expected = torch.stack([maps[:, :, a:b, c:d].mean((2, 3)) for (a, b), (c, d) in itertools.product(bins, bins)], 1)
    torch.testing.assert_close(Bare(3)(x, 9), expected)


def test_tokens_come_row_by_row() -> None:
    rows, columns = torch.meshgrid(torch.arange(1.0, 5), torch.arange(1.0, 5), indexing="ij")
    maps = torch.stack([rows, columns]).unsqueeze(0).double()
    tokens = Bare(2)(maps, 4)[0]
    torch.testing.assert_close(tokens, torch.tensor([[1.5, 1.5], [1.5, 3.5], [3.5, 1.5], [3.5, 3.5]]).double())
    torch.testing.assert_close(Bare(2)(maps.flatten(2).transpose(1, 2), 4)[0], tokens)
    oblong = Bare(2)(maps, (1, 2))[0]
    torch.testing.assert_close(oblong, torch.tensor([[2.5, 1.5], [2.5, 3.5]]).double())


def test_the_gated_map_is_llamas() -> None:
    project, x = shaken(TokenFlex(8, 12, num_tokens=4, hidden_dim=20)), features(tokens=16, dim=8)
    z = F.adaptive_avg_pool2d(as_map(x, 8), 2).flatten(2).transpose(1, 2)
    gate, up, down = (m.weight for m in (project.gate_proj, project.up_proj, project.down_proj))
    torch.testing.assert_close(project(x), (F.silu(z @ gate.T) * (z @ up.T)) @ down.T)


def test_peer_llama_mlp() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    peer = llama.LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=20, num_attention_heads=2)).double()
    project, x = TokenFlex(8, 8, num_tokens=4, hidden_dim=20).double(), features(tokens=16, dim=8)
    project.load_state_dict(peer.state_dict())
    z = nn.AdaptiveAvgPool2d((2, 2))(as_map(x, 8)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(project(x), peer(z))


def test_a_constant_map_gives_equal_tokens_and_a_closed_gate_nothing() -> None:
    project = shaken(TokenFlex(8, 12, num_tokens=9, norm=True))
    y = project(features(tokens=1, dim=8).expand(-1, 49, -1))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    with torch.no_grad():
        project.gate_proj.weight.zero_()
    assert (project(features(tokens=49, dim=8)) == 0).all()


def test_the_same_weights_serve_every_number_of_tokens() -> None:
    project, x = shaken(TokenFlex(8, 12)), features(tokens=256, dim=8)
    for n in (64, 144, 256):
        assert project(x, n).shape == (2, n, 12)
    project.num_tokens = 16
    torch.testing.assert_close(project(x), project(x, 16))
    whole = {k: v.shape for k, v in project.state_dict().items()}
    assert whole == {"gate_proj.weight": (12, 8), "up_proj.weight": (12, 8), "down_proj.weight": (12, 12)}


def test_the_norm_stands_after_pooling() -> None:
    project, x = shaken(TokenFlex(8, 12, num_tokens=4, norm=True)), features(tokens=16, dim=8)
    plain = TokenFlex(8, 12, num_tokens=4).double()
    plain.load_state_dict({k: v for k, v in project.state_dict().items() if not k.startswith("norm")})
    z = F.layer_norm(
        F.adaptive_avg_pool2d(as_map(x, 8), 2).flatten(2).transpose(1, 2), (8,), project.norm.weight, project.norm.bias
    )
    torch.testing.assert_close(project(x), plain(z.transpose(1, 2).unflatten(2, (2, 2))))


def test_weights_start_small() -> None:
    torch.manual_seed(0)
    project = TokenFlex(64, 64)
    for p in project.parameters():
        assert abs(float(p.detach().std()) - 0.02) < 0.001


def test_a_finer_grid_than_the_features_warns() -> None:
    project, x = TokenFlex(8, 12).double(), features(tokens=16, dim=8)
    with pytest.warns(UserWarning, match="finer than the features' 4 x 4"):
        y = project(x, 64)
    torch.testing.assert_close(y[:, 0], y[:, 1])


def test_projector_differentiates_compiles_exports_and_runs_in_half_precision() -> None:
    project, x = shaken(TokenFlex(8, 6, num_tokens=4, norm=True)), features(tokens=25, dim=8)
    assert torch.autograd.gradcheck(project, x.clone().requires_grad_(), fast_mode=True)
    expected = project(x)
    torch.testing.assert_close(torch.compile(project, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(project, (x,)).module()(x), expected)
    half = copy.deepcopy(project).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=0.05 * float(expected.detach().abs().max()), rtol=0)
    project(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in project.parameters())


def test_draws_follow_their_probabilities() -> None:
    from scipy.stats import chisquare

    for probs in (None, (0.5, 0.3, 0.2)):
        sampler = TokenCountSampler(probs=probs)
        draws = [sampler.at(step) for step in range(3000)]
        observed = [draws.count(n) for n in sampler.counts]
        assert sum(observed) == 3000
        assert chisquare(observed, [3000 * p for p in sampler.probs]).pvalue > 1e-3
    assert TokenCountSampler().expected == pytest.approx(154.667, abs=1e-3)
    assert {TokenCountSampler(probs=(0, 2, 0)).at(s) for s in range(20)} == {144}


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    one, other = TokenCountSampler(seed=1), TokenCountSampler(seed=1)
    other.at(5)
    assert [one.at(s) for s in range(50)] == [other.at(s) for s in range(50)]
    assert list(itertools.islice(one, 50)) == [one.at(s) for s in range(50)]
    assert [TokenCountSampler(seed=2).at(s) for s in range(50)] != [one.at(s) for s in range(50)]


def test_placeholders_are_counted_per_image() -> None:
    ids = torch.tensor([[9, 9, 9, 9, 1], [9, 9, 9, 9, 9]])
    check_placeholders(ids[:1], 9, 4)
    check_placeholders(ids, 9, (1, 1), images=torch.tensor([4, 5]))
    check_placeholders(torch.tensor([[1, 2], [9, 1]]), 9, 1, images=[0, 1])
    with pytest.raises(InputError, match=r"text 1 has 5 image placeholders, expected 4; expand each image token to 4"):
        check_placeholders(ids, 9, 4)


def test_placeholders_are_expanded_to_what_is_drawn() -> None:
    text = torch.tensor([1, 9, 2, 9, 3])
    sampler = TokenCountSampler((4, 9))
    for step in range(6):
        n = sampler.at(step)
        ids = expand_placeholders(text, 9, n)
        assert ids.tolist() == [1, *[9] * n, 2, *[9] * n, 3]
        check_placeholders(ids.unsqueeze(0), 9, n, images=2)
    tiled = expand_placeholders(text, 9, (1, 2), tiles=[3, 1])
    assert tiled.tolist() == [1, *[9] * 6, 2, 9, 9, 3]
    check_placeholders(tiled.unsqueeze(0), 9, (1, 2), images=4)
    assert expand_placeholders(text[:1], 9, 4, tiles=[]).tolist() == [1]
    for tiles in ([1], [1, 0], 0):
        with pytest.raises(InputError, match="tiles: expected at least one for each of the text's 2 images"):
            expand_placeholders(text, 9, 4, tiles)


def llava() -> Any:
    """A small LLaVA whose projector is replaced; its image token is 31."""
    pytest.importorskip("transformers")
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=31, vision_feature_select_strategy="default"
    )
    model = LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector = TokenFlex(16, 24)
    return model


def test_in_a_vision_language_model() -> None:
    """The same model then reads images in any number of tokens."""
    model = llava().eval()
    image = torch.randn(1, 3, 16, 16)
    logits = {}
    for n in (1, 4, 16):
        model.model.multi_modal_projector.num_tokens = n
        ids = torch.tensor([[1, *([31] * n), 5, 6]])
        check_placeholders(ids, 31, n)
        logits[n] = model(input_ids=ids, pixel_values=image).logits[:, -1]
        other = model(input_ids=ids, pixel_values=-image).logits[:, -1]
        assert not torch.equal(logits[n], other)
    assert not torch.equal(logits[1], logits[4])


def test_generation_with_a_number_of_tokens_per_request() -> None:
    """The cache holds as many keys as the request has tokens, the weights are the same."""
    model = llava().eval()
    image = torch.randn(1, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for n in (4, 1, 16):
        model.model.multi_modal_projector.num_tokens = n
        ids = torch.tensor([[1, *([31] * n), 5, 6]])
        made = model.generate(
            input_ids=ids,
            pixel_values=image,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        assert made.sequences.shape == (1, n + 6)
        # the last token drawn is not read any more
        assert made.past_key_values.get_seq_length() == n + 5
        prefill = model(input_ids=ids, pixel_values=image).logits[:, -1].argmax(-1)
        assert made.sequences[0, n + 3] == prefill
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: TokenFlex(0, 4), "dim"),
        (lambda: TokenFlex(4, 4, hidden_dim=0), "hidden_dim"),
        (lambda: TokenFlex(4, 4, num_tokens=5), "num_tokens"),
        (lambda: TokenFlex(4, 4, num_tokens=(2, 0)), "num_tokens"),
        (lambda: TokenFlex(4, 4)(torch.ones(1, 17, 4)), "x"),
        (lambda: TokenFlex(4, 4)(torch.ones(1, 16, 5)), "x"),
        (lambda: TokenFlex(4, 4)(torch.ones(1, 16, 4), num_tokens=7), "num_tokens"),
        (lambda: TokenCountSampler(()), "probs"),
        (lambda: TokenCountSampler((4, 9), (1.0,)), "probs"),
        (lambda: TokenCountSampler((4, 9), (-1.0, 2.0)), "probs"),
        (lambda: TokenCountSampler((4, 8)), "num_tokens"),
    ],
)
def test_wrong_arguments_are_named(call: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        call()
