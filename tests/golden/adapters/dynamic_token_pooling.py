from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor

from cenote.reduce.dynamic_token_pooling.boundaries import (
    BoundaryPredictor,
    binomial_loss,
    boundary_cross_entropy,
    entropy_spikes,
    relaxed_bernoulli,
)
from cenote.reduce.dynamic_token_pooling.model import HourglassLM
from cenote.reduce.dynamic_token_pooling.shortening import EPS, downsample, upsample
from tests.golden.cases import Case, adapter, load_parameters


@adapter("dynamic-token-pooling", "shortening.downsample / shortening.upsample")
def shorten(case: Case) -> dict[str, Tensor]:
    i = case.inputs
    hidden, boundaries, null_group = i["hidden_LBD"], i["boundaries_BL"], i["null_group"]
    short = downsample(boundaries, hidden.transpose(0, 1), null_group)
    up = upsample(boundaries, torch.tanh(short @ i["w"])).transpose(0, 1)
    grads = torch.autograd.grad((up * i["coef"]).sum(), [hidden, boundaries, null_group])
    return {
        "short_SBD": with_their_tails(short, hidden, boundaries).transpose(0, 1),
        "upsampled_LBD": up,
        **{f"grad_{n}": g for n, g in zip(("hidden", "boundaries", "null_group"), grads, strict=True)},
    }


def with_their_tails(short: Tensor, hidden_LBD: Tensor, boundaries: Tensor) -> Tensor:
    """Theirs leave the unfinished segment of an item in the row behind its last, where another item has one; never read."""
    found = short.clone()
    for item, cuts in enumerate(boundaries.detach()):
        closed = int(cuts.sum())
        tail = hidden_LBD[:, item][cuts.cumsum(0) - cuts == closed]
        if closed + 1 < short.shape[1]:
            found[item, closed + 1] = tail.sum(0) / (len(tail) + EPS)
    return found


@adapter("dynamic-token-pooling", "hourglass.MemTransformerLM")
def language_model(case: Case) -> dict[str, Tensor]:
    c, i = case.config, case.inputs
    before, (middle,), behind = ast.literal_eval(c["model_config"])
    given = "boundaries_TB" in i and c["boundaries_type"] in ("whitespaces", "fixed", "unigram")
    kind: Any = {"whitespaces": "whitespace"}.get(c["boundaries_type"], c["boundaries_type"])
    model = HourglassLM(
        c["n_token"],
        (before, middle, behind),
        c["d_model"],
        c["n_head"],
        c["d_head"],
        c["d_inner"],
        boundaries=kind,
        every=c.get("fixed_sf", 1),
        pre_norm=c.get("pre_lnorm", False),
        activation=c.get("activation_function", "gelu"),
    )
    load_parameters(model, {ours(k): v for k, v in case.params.items() if k != "pos_emb.inv_freq"})
    read = model(i["data_TB"].T, i["target_TB"].T, i["boundaries_TB"].T if given else None)
    assert read.losses is not None
    wanted = {"grad_word_emb": model.embedding.weight, "grad_null_group": model.null_group}
    wanted = {name: p for name, p in wanted.items() if name in case.expected}
    grads = torch.autograd.grad(read.losses.sum(), list(wanted.values()))
    return {
        "loss_TB": read.losses.T,
        "logits_TBxV": read.logits.transpose(0, 1).flatten(0, 1),
        "shortened_length": read.segments.max() + 1,
        **dict(zip(wanted, grads, strict=True)),
    }


@adapter("dynamic-token-pooling", "hourglass.BoundaryPredictor")
def predictor(case: Case) -> dict[str, Tensor]:
    c, i = case.config, case.inputs
    model = BoundaryPredictor(
        c["d_model"], c["d_inner"], "supervised", c["temp"], c["threshold"], c.get("activation", "gelu")
    )
    load_parameters(model, case.params, {"boundary_predictor.": "layers."})
    hidden = i["hidden_TBD"].transpose(0, 1)
    soft, hard = model(hidden)
    loss = boundary_cross_entropy(soft, i["gt_BT"], code_parity=True)
    cuts = hard.detach().double().requires_grad_()
    prior = binomial_loss(cuts, c["prior"])
    found = {
        "soft_BT": soft,
        "hard_BT": hard,
        "loss_code_double_sigmoid": loss,
        "grad_hidden": torch.autograd.grad(loss, i["hidden_TBD"], retain_graph=True)[0],
        "prior_loss": prior,
        "grad_hard_of_prior_loss": torch.autograd.grad(prior, cuts)[0],
        "relaxed_bernoulli_BT": relaxed_bernoulli(model.logits(hidden), i["uniform_noise_BT"], c["temp"]),
        "spikes_TB": entropy_spikes(i["entropy_TB"].T, c["spikes_left"]).T,
    }
    # theirs come in the precision of 1.0 and 0.0
    return {name: t.to(case.expected[name].dtype) for name, t in found.items()}


def ours(name: str) -> str:
    for theirs, mine in (
        ("r_w_bias", "content_bias"),
        ("r_r_bias", "distance_bias"),
        ("word_emb.", "embedding."),
        ("down_ln.", "short_norm."),
        ("final_cast.", "output."),
        ("boundary_predictor.boundary_predictor.", "predictor.layers."),
        ("dec_attn.qkv_net.", "qkv."),
        ("dec_attn.r_net.", "distances."),
        ("dec_attn.o_net.", "output."),
        ("dec_attn.layer_norm.", "attention_norm."),
        ("pos_ff.CoreNet.", "network."),
        ("pos_ff.layer_norm.", "norm."),
        ("layers.", "stacks."),
    ):
        # the predictor's own layers keep their name
        if theirs != "layers." or name.startswith(theirs):
            name = name.replace(theirs, mine)
    return name
