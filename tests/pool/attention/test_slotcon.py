import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.pools import features, randn, shaken
from torch import nn

import cenote.pool.attention.slotcon.model as slotcon_model
from cenote.core import Bags, InputError
from cenote.pool.attention.slotcon.grouping import Grouped, SemanticGrouping
from cenote.pool.attention.slotcon.groups import nearest_slots, shares_of_image
from cenote.pool.attention.slotcon.lars import LARS
from cenote.pool.attention.slotcon.model import SlotCon, active_slots
from cenote.pool.attention.slotcon.trainer import SlotConTrainer
from cenote.pool.attention.slotcon.views import TwoCrops, View, crop, inverse_augment, overlap

NEVER = torch.tensor([False, False])


def small(**settings: object) -> SlotCon:
    torch.manual_seed(0)
    encoder = nn.Conv2d(1, 6, 3, stride=2, padding=1)
    return SlotCon(encoder, 6, **{"slots": 4, "dim": 5, "hidden": 8} | settings).double()


def crops(model: SlotCon, batch: int = 3) -> tuple[View, View]:
    return TwoCrops(8, scale=(0.4, 0.9))(torch.rand(batch, 1, 12, 12, dtype=torch.float64))


def test_grouping_is_its_equation() -> None:
    pool = shaken(SemanticGrouping(6, slots=3, temp=0.5, eps=1e-3))
    x = features(2, 7, 6)
    dots = F.normalize(x, dim=-1) @ F.normalize(pool.slot_embed, dim=-1).T
    a = (dots / 0.5).softmax(-1) + 1e-3
    expected = torch.einsum("bnk,bnd->bkd", a, x) / a.sum(1).unsqueeze(-1)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, (a / a.sum(1, keepdim=True)).transpose(1, 2))
    torch.testing.assert_close(pool.dots(x), dots)


def test_one_prototype_or_much_heat_gives_the_mean() -> None:
    x = features(2, 7, 6)
    torch.testing.assert_close(shaken(SemanticGrouping(6, slots=1))(x), x.mean(1))
    hot = shaken(SemanticGrouping(6, slots=3, temp=1e12))
    torch.testing.assert_close(hot(x), x.mean(1, keepdim=True).expand(-1, 3, -1))


def test_without_heat_slots_are_means_of_what_is_assigned() -> None:
    pool = shaken(SemanticGrouping(6, slots=3, temp=1e-5, eps=1e-12))
    x = features(2, 40, 6)
    best = pool.dots(x).argmax(-1)
    for item in range(2):
        for k in range(3):
            torch.testing.assert_close(pool(x)[item, k], x[item, best[item] == k].mean(0))


def test_a_map_of_one_place_gives_every_slot_that_place_and_one_active_prototype() -> None:
    pool, x = shaken(SemanticGrouping(6, slots=3)), randn(2, 6, 1, 1)
    slots, dots = pool.group(x)
    torch.testing.assert_close(slots, x.flatten(1).unsqueeze(1).expand(-1, 3, -1))
    assert active_slots(dots).sum(1).tolist() == [1, 1]


def test_what_is_not_assigned_leaks_by_eps() -> None:
    pool, x = shaken(SemanticGrouping(6, slots=2, temp=1e-5, eps=0.1)), features(1, 8, 6)
    own = (pool.dots(x)[0].argmax(-1) == 0).double()
    share = own + 0.1
    torch.testing.assert_close(pool(x)[0, 0], share @ x[0] / share.sum())


def test_scale_of_tokens_and_their_order() -> None:
    pool = shaken(SemanticGrouping(6, slots=3))
    x = features(2, 7, 6)
    torch.testing.assert_close(pool(3 * x), 3 * pool(x))
    torch.testing.assert_close(pool.dots(3 * x), pool.dots(x))
    torch.testing.assert_close(pool(x[:, torch.randperm(7)]), pool(x))


def test_maps_bags_and_zero_tokens() -> None:
    pool = shaken(SemanticGrouping(6, slots=3))
    maps = randn(2, 6, 3, 4)
    slots, dots = pool.group(maps)
    x = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(slots, pool(x))
    torch.testing.assert_close(dots, pool.dots(x).transpose(1, 2).unflatten(2, (3, 4)))
    torch.testing.assert_close(pool(Bags.from_padded(x)), slots)
    zero = torch.zeros(1, 4, 6, dtype=torch.float64)
    assert not pool(zero).any()


def test_inverse_augment_is_roi_align() -> None:
    """Against RoIAlign written out: aligned corners, one sample per bin, clamped at the border."""
    maps, box = randn(2, 3, 5, 7), torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 0.3]], dtype=torch.float64)
    got = inverse_augment(maps, box, NEVER)
    for b in range(2):
        x1, y1, x2, y2 = (box[b] * torch.tensor([7.0, 5.0, 7.0, 5.0])).tolist()
        for i in range(5):
            for j in range(7):
                y = min(max(y1 - 0.5 + (i + 0.5) * (y2 - y1) / 5, 0.0), 4.0)
                x = min(max(x1 - 0.5 + (j + 0.5) * (x2 - x1) / 7, 0.0), 6.0)
                top, left = min(int(y), 3), min(int(x), 5)
                dy, dx = y - top, x - left
                m = maps[b, :, top : top + 2, left : left + 2]
                expected = (1 - dy) * ((1 - dx) * m[:, 0, 0] + dx * m[:, 0, 1])
                expected = expected + dy * ((1 - dx) * m[:, 1, 0] + dx * m[:, 1, 1])
                torch.testing.assert_close(got[b, :, i, j], expected)


def test_whole_box_is_the_identity_and_flip_mirrors() -> None:
    maps, whole = randn(2, 3, 5, 7), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(inverse_augment(maps, whole, NEVER), maps)
    torch.testing.assert_close(inverse_augment(maps, whole, ~NEVER), maps.flip(3))
    assert inverse_augment(maps, whole, NEVER, (2, 3)).shape == (2, 3, 2, 3)


def test_crop_of_whole_pixels_and_overlap() -> None:
    images = randn(2, 1, 12, 12)
    boxes = torch.tensor([[2, 3, 10, 11], [0, 4, 8, 12]], dtype=torch.float64) / 12
    got = crop(images, boxes, torch.tensor([False, True]), (8, 8))
    torch.testing.assert_close(got[0], images[0, :, 3:11, 2:10])
    torch.testing.assert_close(got[1], images[1, :, 4:12, 0:8].flip(2))
    other = torch.tensor([[4, 3, 12, 11], [0, 0, 8, 8]], dtype=torch.float64) / 12
    seen = overlap(boxes, other, torch.tensor([False, False]))
    torch.testing.assert_close(seen * 8, torch.tensor([[2, 0, 8, 8], [0, 0, 8, 4]], dtype=torch.float64))
    mirrored = overlap(boxes, other, torch.tensor([True, True]))
    torch.testing.assert_close(mirrored * 8, torch.tensor([[0, 0, 6, 8], [0, 0, 8, 4]], dtype=torch.float64))


def test_after_inverse_augmentation_places_correspond() -> None:
    """Images that hold their own coordinates: both views must tell the same."""
    torch.manual_seed(0)
    lines = (torch.arange(48, dtype=torch.float64) + 0.5) / 48
    image = torch.stack([lines.expand(48, 48), lines.unsqueeze(1).expand(48, 48)])
    first, second = TwoCrops(32, scale=(0.3, 0.8), least_overlap=0.2)(image.expand(40, -1, -1, -1))
    assert first.flip.any()
    assert not first.flip.all()
    a, b = (inverse_augment(v.x, v.box, v.flip) for v in (first, second))
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # the border is clamped
    torch.testing.assert_close(a[inside], b[inside], atol=0.02, rtol=0)


def test_crops_overlap_as_much_as_asked() -> None:
    torch.manual_seed(0)
    first, second = TwoCrops(8, scale=(0.2, 0.3), least_overlap=0.3, flip=0.0)(torch.rand(200, 1, 16, 16))
    area = (first.box[:, 2:] - first.box[:, :2]).prod(1)
    assert area.min() >= 0.3 - 1e-5
    for v in (first, second):
        assert v.box.min() >= 0
        assert v.box.max() <= 1
    assert not first.flip.any()
    # so small that they never meet by chance: then both are the same part
    same = TwoCrops(8, scale=(1e-6, 1e-6), least_overlap=0.9)(torch.rand(5, 1, 16, 16))[0]
    torch.testing.assert_close(same.box, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(5, -1))


def test_student_and_teacher_start_alike() -> None:
    model = small()
    x = torch.rand(3, 1, 12, 12, dtype=torch.float64)
    whole = View(x, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 3, dtype=torch.float64), torch.zeros(3, dtype=torch.bool))
    student = model.grouping.group(model.projector(model.encoder(x)))
    torch.testing.assert_close(model.teach(x).dots, student.dots)
    # with equal temperatures and no center, the group loss is the entropy of the assignment
    model.student_temp = model.teacher_temp
    p = (student.dots / model.teacher_temp).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    torch.testing.assert_close(model.eval().group_loss(student.dots, student.dots), entropy)
    losses = model.train()(whole, whole)
    torch.testing.assert_close(losses.group, 2 * entropy)


def slot_loss_by_hand(model: SlotCon, student: Grouped, teacher: Grouped, first: int = 0) -> torch.Tensor:
    """Asked by the images from number `first` on."""
    seen_q, seen_k = active_slots(student.dots), active_slots(teacher.dots)
    keys = [(b, k) for b in range(len(seen_k)) for k in range(seen_k.shape[1]) if seen_k[b, k]]
    terms = []
    for own in [(b, k) for b, k in keys if seen_q[b, k] and b >= first]:
        q = model.predictor(student.slots[own].unsqueeze(0))[0]
        logits = torch.stack([F.cosine_similarity(q, teacher.slots[key], dim=0) for key in keys]) / model.tau
        terms.append(-logits.log_softmax(0)[keys.index(own)])
    return 2 * model.tau * torch.stack(terms).mean()


def grouped(batch: int = 3, slots: int = 4) -> Grouped:
    return Grouped(randn(batch, slots, 5), randn(batch, slots, 2, 2))


def test_slot_loss_by_hand() -> None:
    torch.manual_seed(1)
    model = small().eval()
    student, teacher = grouped(), grouped()
    torch.testing.assert_close(model.slot_loss(student, teacher), slot_loss_by_hand(model, student, teacher))


def test_slot_loss_over_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes sees the keys of both, its own behind those of the first."""
    torch.manual_seed(2)
    model = small().eval()
    mine, theirs, other = grouped(), grouped(), grouped()
    keys = iter([F.normalize(other.slots.flatten(0, 1), dim=-1), active_slots(other.dots).flatten()])
    monkeypatch.setattr(slotcon_model, "_gathered", lambda rows: torch.cat([next(keys), rows]))
    monkeypatch.setattr(slotcon_model, "_rank", lambda: 1)
    together = model.slot_loss(mine, theirs)
    monkeypatch.undo()
    student = Grouped(torch.cat([other.slots, mine.slots]), torch.cat([other.dots, mine.dots]))
    teacher = Grouped(torch.cat([other.slots, theirs.slots]), torch.cat([other.dots, theirs.dots]))
    torch.testing.assert_close(together, slot_loss_by_hand(model, student, teacher, first=len(other.slots)))


def test_no_shared_slot_costs_nothing() -> None:
    model = small().train()
    student, teacher = grouped(1, 2), grouped(1, 2)
    slots = student.slots.requires_grad_()
    high, low = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    apart = (Grouped(slots, torch.cat([high, low], 1)), Grouped(teacher.slots, torch.cat([low, high], 1)))
    for pair in (apart, (apart[0], apart[0])):  # none shared, and a single one that the BatchNorm cannot take
        loss = model.slot_loss(*pair)
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, slots)
        assert not grad.any()
    assert model.eval().slot_loss(apart[0], apart[0]).isfinite()


def test_teacher_follows_and_learns_nothing_itself() -> None:
    model = small()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1.0)
    before = copy.deepcopy(model.teacher[0].weight)
    model.update_teacher(0.0)
    torch.testing.assert_close(model.teacher[0].weight, before + 0.01)
    model.update_teacher(0.5)
    m = 1 - 0.01 * 0.5
    torch.testing.assert_close(model.teacher[0].weight, m * (before + 0.01) + (1 - m) * (before + 1))
    last = model.teacher[0].weight.clone()
    model.update_teacher(1.0)
    assert torch.equal(model.teacher[0].weight, last)
    model(*crops(model)).total.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_center_moves_in_training_only() -> None:
    model = small()
    views = crops(model)
    model.train()(*views)
    with torch.no_grad():
        dots = torch.cat([model.teach(v.x).dots for v in views])
    torch.testing.assert_close(model.center, 0.1 * dots.mean((0, 2, 3)).unsqueeze(0))
    kept = model.center.clone()
    model.eval()(*views)
    assert torch.equal(model.center, kept)


def test_trainer_trains_and_stops_on_time() -> None:
    torch.manual_seed(0)
    model = small().float()
    trainer = SlotConTrainer(
        model, TwoCrops(8, scale=(0.4, 0.9)), steps=30, warm_up=0.1, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3)
    )
    history = trainer.fit([torch.rand(8, 1, 12, 12)])
    assert len(history) == 30
    assert sum(history[-5:]) < sum(history[:5])
    with pytest.raises(InputError, match="steps"):
        trainer.step(torch.rand(8, 1, 12, 12))
    assert trainer.schedule.get_last_lr()[0] == pytest.approx(0.0, abs=1e-6)
    assert model.segment(torch.rand(2, 1, 12, 12)).shape == (2, 6, 6)


def test_a_training_that_was_stopped_goes_on_as_it_would_have() -> None:
    images = torch.rand(4, 1, 12, 12)

    def trainer() -> SlotConTrainer:
        return SlotConTrainer(small().float(), TwoCrops(8, scale=(0.4, 0.9)), steps=6, warm_up=0.5, batch=64)

    def go_on(training: SlotConTrainer, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(steps):
            training.step(images)

    whole, first, second = trainer(), trainer(), trainer()
    for training in (whole, first):
        go_on(training, 3, seed=1)
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    for training in (whole, second):
        go_on(training, 3, seed=2)
    assert second.done == 6
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert second.model.center.any()
    short = SlotConTrainer(small(), TwoCrops(8), steps=2)
    with pytest.raises(InputError, match="state: 3 steps are done, more than the 2"):
        short.load_state_dict(state)


def test_shares_of_an_image_and_the_images_of_a_prototype() -> None:
    torch.manual_seed(0)
    grouping = shaken(SemanticGrouping(6, slots=3))
    found = grouping.group(randn(20, 6, 4, 4))
    shares = shares_of_image(found.dots)
    label = found.dots.argmax(1)
    torch.testing.assert_close(shares, torch.stack([(label == k).double().mean((1, 2)) for k in range(3)], 1))
    images, cosines = nearest_slots(grouping.slot_embed, found, 1, count=4, least=0.25)
    fitting = [i for i in range(20) if shares[i, 1] >= 0.25]
    near = {i: float(F.cosine_similarity(found.slots[i, 1], grouping.slot_embed[1], dim=0)) for i in fitting}
    assert images.tolist() == sorted(near, key=near.__getitem__, reverse=True)[:4]
    assert cosines.tolist() == pytest.approx([near[i] for i in images.tolist()])
    with pytest.raises(InputError, match="prototype: expected a number from 0 to 2"):
        nearest_slots(grouping.slot_embed, found, 3)


def test_default_optimiser_is_lars_with_warm_up() -> None:
    trainer = SlotConTrainer(small(), TwoCrops(8), steps=100, warm_up=0.1, batch=64)
    assert isinstance(trainer.optimizer, LARS)
    rates = []
    for _ in range(100):
        rates.append(trainer.schedule.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.schedule.step()
    assert rates[0] == pytest.approx(0.25 * 0.1)
    assert max(rates) == pytest.approx(0.25)
    assert rates.index(max(rates)) == 9
    assert rates[55] == pytest.approx(0.25 * 0.5)


def test_the_last_step_of_a_training_still_learns() -> None:
    torch.manual_seed(0)
    trainer = SlotConTrainer(small(), TwoCrops(8), steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    images = torch.rand(4, 1, 12, 12, dtype=torch.float64)
    trainer.step(images)
    assert trainer.schedule.get_last_lr() == [0.5]
    before = trainer.model.grouping.slot_embed.detach().clone()
    trainer.step(images)
    assert not torch.equal(before, trainer.model.grouping.slot_embed)


def test_lars_is_its_equation() -> None:
    w, b = nn.Parameter(randn(3, 2)), nn.Parameter(randn(3))
    start, g, gb = w.detach().clone(), randn(3, 2), randn(3)
    optimiser = LARS([w, b], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.01)
    for p, grad in ((w, g), (b, gb)):
        p.grad = grad.clone()
    begin = b.detach().clone()
    optimiser.step()
    decayed = g + 0.1 * start
    velocity = 0.01 * start.norm() / decayed.norm() * decayed
    torch.testing.assert_close(w.detach(), start - 0.5 * velocity)
    torch.testing.assert_close(b.detach(), begin - 0.5 * gb)
    optimiser.step()
    torch.testing.assert_close(b.detach(), begin - 0.5 * gb - 0.5 * 1.9 * gb)


def test_errors() -> None:
    for call, name in (
        (lambda: SemanticGrouping(4, slots=0), "slots"),
        (lambda: SemanticGrouping(4, temp=0.0), "temp"),
        (lambda: SemanticGrouping(4, eps=-1.0), "eps"),
        (lambda: small(momentum=1.5), "momentum"),
        (lambda: small(tau=0.0), "tau"),
        (lambda: TwoCrops(0), "size"),
        (lambda: TwoCrops(8, scale=(0.5, 0.2)), "scale"),
        (lambda: TwoCrops(8, ratio=(0.0, 1.0)), "ratio"),
        (lambda: TwoCrops(8, flip=2.0), "flip"),
        (lambda: SlotConTrainer(small(), TwoCrops(8), steps=0), "steps"),
        (lambda: SlotConTrainer(small(), TwoCrops(8), steps=5, warm_up=1.0), "warm_up"),
        (lambda: SlotConTrainer(small(), TwoCrops(8), steps=5).fit([]), "batches"),
        (lambda: LARS([nn.Parameter(torch.ones(1))], lr=-1.0), "lr"),
    ):
        with pytest.raises(InputError, match=name):
            call()
    assert math.isfinite(float(small()(*crops(small())).total.detach()))
