"""Ctrl-C at any moment of entering and leaving."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor

from cenote.core.interrupts import uninterrupted
from cenote.models.live import (
    AddedStates,
    DenoisingStep,
    RowRecorder,
    Shorten,
    Where,
    denoising,
    edited,
    left,
    seats,
    shorten,
    swapped,
    transformers,
)
from cenote.models.live.edited import _REMEMBERING as remembering
from cenote.models.live.sdpa import _before as forwards
from cenote.testing.as_found import fingerprint

FILES = tuple(
    f"live/{name}.py" for name in ("denoise", "edited", "transformers", "sdpa", "seats", "left", "shorten", "swapped")
)


@pytest.fixture(autouse=True)
def _pythons_own_handler() -> Iterator[None]:
    """A command that ran before in this process has set its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits() -> None:
    done: list[str] = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("to the end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["to the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_inside_comes_out() -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_let_through() -> None:
    ran: list[bool] = []

    def work() -> None:
        with uninterrupted():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]


def left_over() -> tuple[object, ...]:
    """What is kept of contexts while they are entered."""
    return (
        seats.SEATED,
        transformers._entered,
        transformers._taken,
        forwards,
        left._STANDING,
        shorten._RUNNING,
        remembering,
    )


def every_other(x: Any, sizes: Any, mask: Any) -> Any:
    from cenote.core.reduced import Reduced

    to = torch.arange(x.shape[1]).expand(len(x), -1) // 2
    return Reduced(x[:, ::2], torch.full_like(sizes[:, ::2], 2.0), to)


def calls_of(files: tuple[str, ...], act: Callable[[], object], stop_at: int | None) -> int:
    """How many calls in these files it makes; at one of them there comes a Ctrl-C."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        # not in expressions: where these are dropped, Python lets no Ctrl-C out
        if event == "call" and frame.f_code.co_filename.endswith(files) and not frame.f_code.co_name.startswith("<"):
            count += 1
            if count == stop_at:
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(trace)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


class Denoiser(zoo.OwnBlock):
    def forward(self, sample: Tensor, timestep: int) -> Tensor:
        return super().forward(sample) * timestep


class Scheduler:
    def scale_model_input(self, sample: Tensor, timestep: int) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        return sample - model_output


def test_a_denoising_loop_is_as_it_was() -> None:
    denoiser, scheduler, latents = Denoiser(8, 2).eval(), Scheduler(), torch.ones(1, 3, 8)

    def painted() -> Tensor:
        return scheduler.step(denoiser(scheduler.scale_model_input(latents, 1), 1), 1, latents)

    def looks(step: DenoisingStep) -> None:
        look = step.look()
        step.latents = step.latents - look.gradient(look.prediction.square().sum())

    def enter_and_leave() -> None:
        with denoising(denoiser, RowRecorder(), scheduler=scheduler, on_step=looks, maps=Where()):
            painted()

    with torch.no_grad():
        enter_and_leave()
        before, plain = fingerprint(denoiser), painted()
        interrupted = 0
        for i in range(1, calls_of(FILES, enter_and_leave, None) + 1):
            try:
                calls_of(FILES, enter_and_leave, i)
            except KeyboardInterrupt:
                interrupted += 1
            assert not any(left_over()), f"call {i}"
            assert not vars(scheduler), f"call {i}"
            assert fingerprint(denoiser) == before, f"call {i}"
            assert torch.equal(painted(), plain), f"call {i}"
        assert interrupted > 20


@pytest.mark.parametrize("kind", ["registry", "fused", "shortened", "swapped"])
def test_a_model_is_as_it_was(kind: str) -> None:
    case = zoo.MODELS["llama"]("sdpa") if kind != "fused" else zoo.MODELS["own"]("sdpa")
    model = case.model
    contexts = {
        "registry": lambda: edited(model, RowRecorder(), AddedStates({0: torch.ones(32)})),
        "fused": lambda: edited(model, RowRecorder()),
        "shortened": lambda: edited(model, Shorten(every_other, 0)),
        "swapped": lambda: swapped(model, {"model.layers.0.mlp": lambda old: old}),
    }

    def enter_and_leave() -> None:
        with contexts[kind]():
            model(**case.inputs)

    with torch.no_grad():
        enter_and_leave()
        before = fingerprint(model)
        interrupted = 0
        for i in range(1, calls_of(FILES, enter_and_leave, None) + 1):
            try:
                calls_of(FILES, enter_and_leave, i)
            except KeyboardInterrupt:
                interrupted += 1
            assert not any(left_over()), f"call {i}"
            assert fingerprint(model) == before, f"call {i}"
        assert interrupted > 2
