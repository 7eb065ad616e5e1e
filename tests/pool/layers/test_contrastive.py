from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.pool.layers.test_weighted_sum import stack
from tests.pools import by_rules, dense_attention, features, shaken

from cenote.core import InputError
from cenote.pool import (
    LatentAttention,
    MultiLayerTrainable,
    Triple,
    hard_negative_loss,
    mined_negatives,
    nearest,
    read_triples,
)
from cenote.pool.layers.multi_layer_trainable import contrastive
from cenote.testing import check_layer_pool, check_pool

SMALL = {"latents": 5, "heads": 3, "head_dim": 4}


def test_the_loss_written_out() -> None:
    q, d, n = (features(1, 4, 6, seed=s)[0] for s in (1, 2, 3))
    passages = torch.cat([d, n])
    cosines = F.cosine_similarity(q.unsqueeze(1), passages.unsqueeze(0), dim=-1)
    expected = -(50 * cosines).log_softmax(1)[range(4), range(4)].mean()
    torch.testing.assert_close(hard_negative_loss(q, d, n), expected)
    alone = -(20 * cosines[:, :4]).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(hard_negative_loss(q, d, scale=20.0), alone)
    torch.testing.assert_close(hard_negative_loss(2 * q, d, n), expected)
    with pytest.raises(InputError, match="negatives: expected shape"):
        hard_negative_loss(q, d, n[:2])


WORKER = """
    import sys, torch
    import torch.distributed as dist
    from cenote.pool.layers.multi_layer_trainable.contrastive import hard_negative_loss
    rank, place = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    q, d, n = (t[2 * rank:2 * rank + 2].clone().requires_grad_() for t in torch.load(f"{place}/in.pt"))
    loss = hard_negative_loss(q, d, n)
    # as training in parallel averages gradients over the processes
    (loss / 2).backward()
    torch.save((loss.detach(), q.grad, d.grad, n.grad), f"{place}/out{rank}.pt")
    # who leaves first would close sockets that the other still reads
    dist.barrier()
    dist.destroy_process_group()
"""


def test_negatives_of_all_processes_are_one_batch(tmp_path: Path) -> None:
    sides = [features(1, 4, 6, seed=s)[0].requires_grad_() for s in (1, 2, 3)]
    loss = hard_negative_loss(*sides)
    loss.backward()
    torch.save([t.detach() for t in sides], tmp_path / "in.pt")
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    found = [torch.load(tmp_path / f"out{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss.detach())
    for i, side in enumerate(sides, 1):
        torch.testing.assert_close(torch.cat([found[0][i], found[1][i]]), side.grad)


def test_search_is_exact_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, d = features(1, 5, 6)[0], features(1, 9, 6, seed=2)[0]
    cosines = F.cosine_similarity(q.unsqueeze(1), d.unsqueeze(0), dim=-1)
    whole = nearest(q, d, 4)
    torch.testing.assert_close(whole.cosines, cosines.sort(1, descending=True).values[:, :4])
    monkeypatch.setattr(contrastive, "AT_ONCE", 18)
    assert torch.equal(nearest(q, d, 4).indices, whole.indices)
    assert nearest(q, d, 40).indices.shape == (5, 9)
    with pytest.raises(InputError, match="passages: expected vectors of width 6"):
        nearest(q, d[:, :3])


def test_hard_negatives_are_the_nearest_that_do_not_answer() -> None:
    q, d = features(1, 5, 6)[0], features(1, 9, 6, seed=2)[0]
    order = nearest(q, d, 9).indices
    answers = [order[i, : 1 + i % 2].tolist() for i in range(5)]
    assert mined_negatives(q, d, answers).tolist() == [int(order[i, 1 + i % 2]) for i in range(5)]
    assert mined_negatives(q, d, [int(i) for i in order[:, 0]], skip=2).tolist() == order[:, 3].tolist()
    with pytest.raises(InputError, match="passages: expected more than 9"):
        mined_negatives(q, d, [list(range(9))] * 5)
    with pytest.raises(InputError, match="positives: expected one for each"):
        mined_negatives(q, d, [0])


def test_triples_are_read(tmp_path: Path) -> None:
    path = tmp_path / "triples.jsonl"
    path.write_text('{"query": "a", "positive": "b", "negative": "c"}\n\n{"query": "d", "positive": "e"}\n', "utf-8")
    assert read_triples(path) == [Triple("a", "b", "c"), Triple("d", "e")]
    for bad in ("nothing", '{"query": "a"}', '{"query": 1, "positive": "b"}', "[]"):
        path.write_text(bad, "utf-8")
        with pytest.raises(InputError, match="in line 1"):
            read_triples(path)
    with pytest.raises(InputError, match="there is no file"):
        read_triples(tmp_path / "x")


def test_latent_attention_written_out() -> None:
    pool, x = shaken(LatentAttention(16, **SMALL)), features()
    k, v = (pool.norm_latents(pool.latents) @ pool.to_kv.weight.T).chunk(2, -1)
    found, _ = dense_attention(
        pool.norm(x) @ pool.to_q.weight.T, k.expand(len(x), -1, -1), v.expand(len(x), -1, -1), pool.heads
    )
    a = found @ pool.to_out.weight.T + x
    u, g = (pool.ff_norm(a) @ pool.ff_in.weight.T + pool.ff_in.bias).chunk(2, -1)
    y = (a + (u * F.gelu(g)) @ pool.ff_out.weight.T + pool.ff_out.bias).mean(1)
    torch.testing.assert_close(pool(x), F.normalize(y, dim=-1))


@by_rules(check_pool)
def test_latent_attention_keeps_the_contract(left_out: tuple[str, ...]) -> None:
    check_pool(LatentAttention(8, **SMALL), leave_out=left_out)


@by_rules(check_layer_pool)
def test_contract_of_some_layers_alone(left_out: tuple[str, ...]) -> None:
    check_layer_pool(MultiLayerTrainable(8, 4, use=(1, 2), **SMALL), leave_out=left_out)


def test_some_layers_alone_are_looked_up() -> None:
    x = stack()
    chosen = shaken(MultiLayerTrainable(8, 4, use=(3, 1), **SMALL))
    two = MultiLayerTrainable(8, 2, **SMALL).double()
    two.load_state_dict(chosen.state_dict())
    torch.testing.assert_close(chosen(x), two(x[:, [3, 1]]))
    weights = chosen.attend(x).weights
    torch.testing.assert_close(weights[:, :, [3, 1]], two.attend(x[:, [3, 1]]).weights)
    assert not weights[:, :, [0, 2]].any()
    with pytest.raises(InputError, match="use: expected numbers of layers from 0 to 3"):
        MultiLayerTrainable(8, 4, use=(4,))
