from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cenote.cli.app import app
from cenote.core import InputError
from tests import tiny

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'cenote[models]'")
RUN = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer, and photographs whose colour is their class."""
    top = tmp_path_factory.mktemp("images")
    tiny.made(top / "vit", "Dinov2Model", _processor, **tiny.DINO)
    rng = np.random.default_rng(0)
    for n in range(20):
        colour = ("red", "blue")[n % 2]
        place = top / "photos" / colour
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        pixels[..., 0 if colour == "red" else 2] += 150
        Image.fromarray(pixels).save(place / f"{n}.png")
    return top


def _processor(place: Path) -> None:
    transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(place)


def test_an_encoder_is_reduced_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["reduce", str(folder / "photos"), "--model", str(folder / "vit"), "--factors", "4", "--blocks", "0"]
    found = RUN.invoke(app, [*arguments, "--seeds", "1", "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert found.exit_code == 0
    assert "unreduced" in found.output
    assert "random-drop x4 behind block 0" in found.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "fewer tokens in" in page
    assert "evenly-spaced x4 behind block 0" in page
    # the page is written again from what was kept
    (tmp_path / "out" / "report.html").unlink()
    assert RUN.invoke(app, ["report", str(tmp_path / "out")], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--model: name the image encoder"),
        (["--queries", "q"], "--queries: is of collections of texts"),
        (["--model", "VIT", "--blocks", "two"], "--blocks: expected numbers separated by commas"),
        (["--model", "VIT", "--blocks", "9"], "blocks: expected some of 0 to"),
        (["--model", "VIT", "--label", "colour"], "colour"),
        (["--model", "VIT", "--methods", "gistpool"], "methods: gistpool reduces contexts"),
        (["--model", "VIT", "--device", "cuda"], "--device: encoders are timed on the CPU"),
    ],
)
def test_what_cannot_be_asked_is_told(folder: Path, tmp_path: Path, given: list[str], message: str) -> None:
    arguments = [str(folder / "vit") if word == "VIT" else word for word in given]
    found = RUN.invoke(app, ["reduce", str(folder / "photos"), *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(found.exception, InputError)
    assert message in str(found.exception)


def test_options_of_images_are_refused_for_texts(tmp_path: Path) -> None:
    found = RUN.invoke(app, ["reduce", "--blocks", "2", "--out", str(tmp_path / "out")])
    assert "--blocks: is of folders of images" in str(found.exception)


def test_what_another_job_found_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    texts = ["reduce", "--model", "hashed-words", "--methods", "sequential", "--factors", "8", "--seeds", "1"]
    out.mkdir()
    (out / "comparison.json").write_text('{"job": "reduce"}')
    images = ["reduce", str(folder / "photos"), "--model", str(folder / "vit"), "--out", str(out)]
    assert "holds what another job found (reduce)" in str(RUN.invoke(app, images).exception)
    (out / "comparison.json").write_text('{"job": "explain"}')
    assert "holds what another job found (explain)" in str(RUN.invoke(app, [*texts, "--out", str(out)]).exception)
    assert (out / "comparison.json").read_text() == '{"job": "explain"}'


def test_an_interrupted_run_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cenote.jobs.reduce import encoder

    run, done = encoder.Reduction.run, []

    def interrupted(arm: encoder.Reduction, *given: object) -> object:
        if len(done) > 1:
            raise KeyboardInterrupt
        done.append(arm.name)
        return run(arm, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder.Reduction, "run", interrupted)
    arguments = ["reduce", str(folder / "photos"), "--model", str(folder / "vit"), "--factors", "4", "--blocks", "0"]
    assert RUN.invoke(app, [*arguments, "--out", str(tmp_path / "out")]).exit_code == 130
