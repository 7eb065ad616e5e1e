"""Images with masks, from the command line: do explanations point at what an image shows?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.cli.conftest import cenote  # noqa: F401 - a fixture
from tests.cli.program import Run
from tests.jobs.explain.models import image_classifier, text_classifier

from cenote.core import InputError
from cenote.features.raw import open_raw
from cenote.jobs.explain import Audit
from cenote.jobs.explain.items import taken
from cenote.models.classifier import load_classifier

SIDE = 40
QUICK = ("--methods", "last-layer-attention,mean-attention")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_classifier(tmp_path_factory.mktemp("model"))


def pictures(folder: Path, count: int = 4) -> tuple[Path, Path]:
    """Images, and masks of their left upper quarters under the same names."""
    images, masks = folder / "images", folder / "masks"
    images.mkdir()
    masks.mkdir()
    rng = np.random.default_rng(0)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[: SIDE // 2, : SIDE // 2] = 1
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
        Image.fromarray(mask).save(masks / f"{i}.png")
    return images, masks


def test_an_audit_of_images_with_masks(cenote: Run, classifier: Path, tmp_path: Path) -> None:  # noqa: F811
    images, masks = pictures(tmp_path)
    out = tmp_path / "out"
    code, text, err = cenote("explain", classifier, images, "--masks", masks, *QUICK, "--out", out)
    assert code == 0, err
    found = Audit.load(out)
    assert found.localised
    assert "in the masks most" in found.sentence
    # a quarter of the patches is inside, and the control that goes from the first patch on begins there
    assert found["position"].pointing == 1.0
    assert found["random"].mass_inside == pytest.approx(0.25, abs=0.12)
    assert all(0 <= value <= 1 for r in found.results for value in (r.pointing, r.mass_inside, r.iou))  # type: ignore[operator]
    assert "IoU" in text
    assert "Inside" in (out / "report.html").read_text()
    code, text, _ = cenote("explain", classifier, images, *QUICK, "--out", tmp_path / "without")
    assert code == 0
    assert not Audit.load(tmp_path / "without").localised
    assert "IoU" not in text


def test_masks_go_through_the_models_preprocessing(classifier: Path, tmp_path: Path) -> None:
    images, masks = pictures(tmp_path)
    made = taken(load_classifier(str(classifier)), open_raw(images, kind="image"), masks=masks)
    assert made.subject.inside is not None
    grid = made.subject.inside.unflatten(1, (4, 4))
    assert bool((grid[:, :2, :2] == 1).all())
    assert float(grid.sum()) == 4 * 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda masks: (masks / "2.png").unlink(), "masks: there is none of 2.jpg in"),
        (lambda masks: Image.new("L", (8, 9)).save(masks / "1.png"), "masks: 1.png is 8 x 9 pixels, and 1.jpg 40 x 40"),
        (lambda masks: Image.new("L", (SIDE, SIDE)).save(masks / "0.png"), "masks: 0.png marks nothing"),
        (lambda masks: (masks / "3.png").write_text("no image"), "masks: 3.png is no image"),
    ],
)
def test_masks_that_do_not_fit_are_named(classifier: Path, tmp_path: Path, break_it: object, message: str) -> None:
    images, masks = pictures(tmp_path)
    break_it(masks)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        taken(load_classifier(str(classifier)), open_raw(images, kind="image"), masks=masks)


def test_texts_have_no_masks(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a b\nc d\n")
    loaded = load_classifier(str(text_classifier(tmp_path / "model")))
    with pytest.raises(InputError, match=r"masks: are of images, and .* takes text"):
        taken(loaded, open_raw(tmp_path / "texts.txt", kind="text"), masks=tmp_path)
