"""The speech example: its front, its trials, and that its commands run."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from examples.speech import languages, recordings
from examples.speech.front import Conformer, LogMel, StreamingTdnn, Tdnn, padded
from examples.speech.verification import equal_error_rate, trials


def test_a_tone_stands_in_the_band_of_its_pitch() -> None:
    rate, mel = 8000, LogMel(8000, bins=40)
    low, high = (2595 * math.log10(1 + f / 700) for f in (60, 4000))
    for hertz in (300.0, 1000.0, 3000.0):
        frames = mel(torch.sin(2 * math.pi * hertz * torch.arange(rate) / rate))
        # 25 ms windows every 10 ms of one second
        assert frames.shape == (98, 40)
        position = (2595 * math.log10(1 + hertz / 700) - low) / (high - low) * 41 - 1
        assert (frames.mean(0).argmax() - position).abs() <= 1
    assert mel(torch.zeros(10)).shape == (1, 40)


def test_energies_are_those_of_the_transform() -> None:
    mel, x = LogMel(8000, bins=10), torch.randn(200, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft(x * torch.hann_window(200, periodic=False), 256).abs().square()
    torch.testing.assert_close(mel(x), ((mel.mel @ spectrum) + 1e-6).log()[None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("front", [Tdnn, Conformer])
def test_padding_does_not_reach_the_frames_of_a_clip(front: type) -> None:
    torch.manual_seed(0)
    model = front(6, 8).eval()
    clips = [torch.randn(n, 6) for n in (31, 12, 20)]
    both = model(*padded(clips))
    for i, clip in enumerate(clips):
        alone = model(*padded([clip]))
        count = int(alone.mask.sum())
        assert int(both.mask[i].sum()) == count == math.ceil(len(clip) / 2)
        torch.testing.assert_close(both.x[i, :count], alone.x[0, :count], atol=1e-5, rtol=1e-4)


def test_packets_of_any_size_give_the_whole_stream() -> None:
    torch.manual_seed(0)
    for pool in languages.POOLS:
        model = languages.Model(pool).eval()
        x = torch.randn(2, 60, languages.STACK * languages.BINS)
        with torch.inference_mode():
            whole = model(x)
            for cut in (1, 7, 60):
                state, found = None, []
                for packet in x.split(cut, 1):
                    scores, state = model.step(packet, state)
                    found.append(scores)
                torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)


def test_a_causal_network_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model, x = StreamingTdnn(6, 8).eval(), torch.randn(1, 30, 6)
    y = x.clone()
    y[:, 20:] = 9
    torch.testing.assert_close(model(x)[:, :20], model(y)[:, :20])


def test_error_rate_of_scores_without_and_with_meaning() -> None:
    rng = np.random.default_rng(0)
    same = rng.random(4000) < 0.3
    assert equal_error_rate(rng.random(4000), same)[0] == pytest.approx(0.5, abs=0.03)
    # two normal distributions, two standard deviations apart: the threshold lies in the middle
    scores = rng.standard_normal(200_000) + 2 * (labels := rng.random(200_000) < 0.5)
    assert equal_error_rate(scores, labels)[0] == pytest.approx(0.1587, abs=0.005)
    # a score that says nothing
    assert equal_error_rate(np.zeros(10), np.arange(10) < 5)[0] == pytest.approx(0.5)


def test_drawing_a_trial_twice_is_having_it_twice() -> None:
    rng = np.random.default_rng(0)
    scores, same = rng.standard_normal(50), rng.random(50) < 0.4
    twice = rng.integers(1, 4, 50)
    repeated = equal_error_rate(np.repeat(scores, twice), np.repeat(same, twice))
    assert equal_error_rate(scores, same, twice[None])[0] == pytest.approx(repeated[0])


def test_trials_are_all_pairs() -> None:
    first, second, same = trials(np.array([0, 0, 1]))
    assert list(zip(first.tolist(), second.tolist(), same.tolist(), strict=True)) == [
        (0, 1, True),
        (0, 2, False),
        (1, 2, False),
    ]


def test_every_speaker_is_unseen_once() -> None:
    for seed in range(3):
        away = [recordings.held_out(seed, fold, 6) for fold in range(recordings.FOLDS)]
        assert sorted(speaker for fold in away for speaker in fold) == list(range(6))


def test_no_test_recording_and_no_unseen_speaker_is_trained_on(data_dir: Path) -> None:
    for task in recordings.TASKS:
        train, test = recordings.split(recordings.Job(task, "mean", 1, 2, "tdnn", "smoke"), data_dir / "fsdd")
        assert train
        assert test
        assert all(c.index >= recordings.TEST for c in train)
        if task in ("unseen", "verification"):
            # faster and slower copies of a speaker are further speakers
            assert not {c.speaker % 6 for c in train} & {c.speaker for c in test}


def test_all_languages_have_the_same_sentences() -> None:
    assert len(languages.LANGUAGES) >= 8
    assert {len(s) for s in languages.SENTENCES.values()} == {11}
    assert not set(languages.TRAIN_VOICES) & set(languages.TEST_VOICES)


def test_noise_takes_the_share_that_was_asked_for() -> None:
    sounds = {("m1", 0, s): np.random.default_rng(s).standard_normal(40_000) for s in range(3)}
    found = [languages.stream(sounds, "m1", 0, [0, 1, 2], seed=s) for s in range(5)]
    assert len({s.rows.shape for s in found}) == 1
    assert found[0].rows.shape == (len(found[0].noise), languages.STACK * languages.BINS)
    assert np.mean([s.noise.float().mean() for s in found]) == pytest.approx(languages.NOISE, abs=0.1)


@pytest.mark.slow("trains for 40 seconds")
def test_the_commands_run(data_dir: Path, tmp_path: Path) -> None:
    common = ["--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--size", "smoke", "--seeds", "2"]
    recordings.main(["--data", str(data_dir / "fsdd"), *common])
    pages = ["speech-recordings"]
    if shutil.which("espeak-ng"):
        languages.main(common)
        pages.append("speech-languages")
    for name in pages:
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert (tmp_path / f"{name}.svg").stat().st_size > 10_000
        assert f"{name}.svg" in (tmp_path / f"{name}.md").read_text()
