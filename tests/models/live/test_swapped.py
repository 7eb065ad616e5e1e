"""Another module in a place: it runs, it learns, and the old one comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.base import Mixer
from cenote.models.live import attentions, swapped
from cenote.models.live.swapped import AsMixer, as_mixer


class Means(nn.Module):
    """The mean of all real tokens, times a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.masks: list[Tensor | None] = []

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        self.masks.append(mask)
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x)
        return (x * real).sum(1, keepdim=True).expand_as(x) / real.sum(1, keepdim=True) * self.factor


class Cumulated(Mixer):
    """Sums of what stands before, and its place."""

    causal = True

    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return x.cumsum(1) + positions.unsqueeze(-1).sin()


@pytest.mark.parametrize("name", ["llama", "vit", "own", "bert", "dinov2"])
def test_a_mixer_runs_learns_and_goes(name: str) -> None:
    case, mixer = zoo.MODELS[name]("sdpa"), Means()
    place = attentions(case.model)[0]
    plain = zoo.tensors(case.model(**case.inputs))
    with swapped(case.model, {place: as_mixer(mixer)}):
        ours = zoo.tensors(case.model(**case.inputs))
        assert mixer.factor.dtype == torch.float32
        ours[0].square().sum().backward()
    assert mixer.factor.grad is not None
    assert mixer.factor.grad.abs() > 0
    assert not torch.equal(ours[0], plain[0])
    assert case.model.get_submodule(place.path) is place.module
    assert all(map(torch.equal, zoo.tensors(case.model(**case.inputs)), plain))


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert", "ViT", "Llama", "GPT2"])
def test_each_item_of_a_batch_is_given_its_own_mix(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    own: dict[str, Any] = {"vocab_size": 20}
    if name == "DistilBert":
        sizes = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 8}
    elif name == "GPT2":
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2}
    elif name == "ViT":
        own = {"image_size": 4, "patch_size": 2}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**own, **sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, 20, (3, 5), generator=generator)
    if name == "ViT":
        x = torch.rand(3, 3, 4, 4, generator=generator)
    at = {place: as_mixer(Cumulated()) for place in attentions(model) if place.kind == "self"}
    with torch.no_grad(), swapped(model, at):
        alone = torch.cat([model(item[None]).last_hidden_state for item in x])
        for count in (2, 3):
            torch.testing.assert_close(model(x[:count]).last_hidden_state, alone[:count])


def test_an_answer_has_as_many_values_as_the_old_one() -> None:
    def bare(x: Tensor) -> Tensor:
        return x

    def said(x: Tensor) -> tuple[Tensor, None]:
        answer = (x, None)
        return answer  # noqa: RET504

    def understated(x: Tensor) -> tuple[Tensor]:
        def inner() -> Tensor:
            return x

        return inner(), x, None  # type: ignore[return-value]

    def one(x: Tensor) -> tuple[Tensor]:
        return (x,)

    for forward, gives in ((bare, None), (said, 2), (understated, 3), (one, 1)):
        old = nn.Identity()
        old.forward = forward  # type: ignore[method-assign]
        found = AsMixer(Means().float(), old)(torch.ones(2, 3, 4))
        assert (len(found) if isinstance(found, tuple) else None) == gives


def test_contexts_left_in_any_order_and_by_an_exception() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    old, first, second = model[1], nn.Tanh(), nn.Sigmoid()
    a, b = swapped(model, {"1": first}), swapped(model, {"1": second})
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert model[1] is second
    b.__exit__(None, None, None)
    assert model[1] is old
    with pytest.raises(RuntimeError, match="midst"), swapped(model, {"1": first}):
        raise RuntimeError("in the midst")
    assert model[1] is old


def test_what_cannot_be_is_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no module of Sequential"), swapped(model, {"7": nn.ReLU()}):
        pass
    with pytest.raises(InputError, match=r"expected a torch.nn.Module, got int"), swapped(model, {"0": 3}):  # type: ignore[dict-item]
        pass
    wrong: Any = ["0"]
    with pytest.raises(InputError, match="expected a module for each place or path, got list"), swapped(model, wrong):
        pass
    wrong = {0: nn.ReLU()}
    with pytest.raises(InputError, match=r"expected places or paths as keys.* got 0"), swapped(model, wrong):
        pass


def test_a_place_inside_of_a_swapped_one_is_refused() -> None:
    model = nn.Sequential(zoo.OwnBlock(8, 2), zoo.OwnBlock(8, 2)).eval()
    (place, _), before = attentions(model), list(model.modules())
    for modules in ({"0": nn.Identity(), place: nn.Identity()}, {"0.attn.qkv": nn.Identity(), "0": nn.Identity()}):
        with pytest.raises(InputError, match=r"'0.attn.*' stands inside of '0'"), swapped(model, modules):
            pytest.fail("entered")
    with pytest.raises(InputError, match="given twice"), swapped(model, {place: nn.Identity(), place.path: nn.ReLU()}):
        pytest.fail("entered")
    assert list(model.modules()) == before
    with swapped(model, {place: nn.Identity(), "1": nn.Identity()}):
        pass
