"""Raw images, sounds and texts as people have them on disk."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import wavfile

from cenote.core import InputError
from cenote.features.raw import RawItems, UnreadableError, open_raw
from cenote.features.raw.decode import check_image, decode_audio, decode_image

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def image(colour: str = "red", mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), COLOURS[colour]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def photos(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image("red" if "red" in name else "blue"))
    return root


def tone(rate: int, seconds: float = 0.5, pitch: float = 440.0) -> np.ndarray:
    return np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


def contents(items: RawItems) -> list[Any]:
    return [item.read().content for item in items.items]


def test_folders_give_labels_and_splits(tmp_path: Path) -> None:
    names = ["train/red/b.png", "train/blue/a.png", "test/red/c.png"]
    items = open_raw(photos(tmp_path, [*names, "train/red/.hidden.png"]))
    assert (items.kind, [item.id for item in items.items]) == ("image", sorted(names))
    assert items.columns == {"split": ["test", "train", "train"], "label": ["red", "blue", "red"]}
    assert contents(items)[1].getpixel((0, 0)) == (0, 0, 255)


def test_one_level_of_folders_is_the_label(tmp_path: Path) -> None:
    assert open_raw(photos(tmp_path, ["red/1.png", "blue/1.png"])).columns == {"label": ["blue", "red"]}
    assert open_raw(photos(tmp_path / "flat", ["1.png", "2.png"])).columns == {}


def test_labels_csv(tmp_path: Path) -> None:
    photos(tmp_path, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text("file,label\nb,cat\na.png,dog\n")
    items = open_raw(tmp_path)
    assert [item.id for item in items.items] == ["b", "a.png"]
    assert items.columns["label"] == ["cat", "dog"]
    other = tmp_path / "other.txt"
    other.write_text("file,label\nb,cat\nz,dog\n")
    with pytest.raises(InputError, match=r"id 'z' in other\.txt has no file"):
        open_raw(tmp_path, labels=other)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (image(mode="P"), (255, 0, 0)),
        (image(mode="CMYK", kind="JPEG"), (254, 0, 0)),
        (image(mode="L"), (76, 76, 76)),
        (image(mode="RGBA"), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(made: bytes, expected: tuple[int, int, int]) -> None:
    found = decode_image(made)
    assert found.mode == "RGB"
    assert np.allclose(found.getpixel((0, 0)), expected, atol=2)


def test_transparent_is_white_and_sixteen_bits_are_scaled() -> None:
    clear, deep = io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear, "PNG")
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(deep, "PNG")
    assert decode_image(clear.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(deep.getvalue()).getpixel((0, 0)) == (127, 127, 127)


def test_pictures_are_turned_as_the_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(image(kind="JPEG", exif=exif)).size == (8, 12)


@pytest.mark.parametrize("cut", [0, 1, 20, -20])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_broken_images(cut: int, kind: str) -> None:
    whole = image(kind=kind)
    for look in (decode_image, check_image):
        with pytest.raises(UnreadableError, match="is no whole image"):
            look(whole[: len(whole) // 2 if cut == 0 else cut])


def damaged(whole: bytes, fault: str, rng: np.random.RandomState) -> bytes:
    at, data = rng.randint(20, len(whole) - 60), bytearray(whole)
    if fault == "cut":
        return whole[:at]
    if fault == "flipped":
        data[at] ^= 1 << rng.randint(8)
    elif fault == "garbage":
        data[at : at + 40] = rng.bytes(40)
    else:
        data[at:] = bytes(len(data) - at)
    return bytes(data)


def complaint(look: Callable[[bytes], Any], data: bytes) -> str | None:
    try:
        look(data)
    except UnreadableError as error:
        return str(error)
    return None


@pytest.mark.parametrize("fault", ["cut", "flipped", "garbage", "zeros to the end"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "progressive JPEG"])
def test_a_check_finds_what_decoding_finds(kind: str, fault: str) -> None:
    rng, made = np.random.RandomState(0), io.BytesIO()
    picture = Image.fromarray(rng.randint(0, 256, (8, 12, 3), dtype=np.uint8)).resize((96, 64))
    picture.save(made, kind.split()[-1], progressive=kind.startswith("prog"))
    assert complaint(check_image, made.getvalue()) is None
    found = 0
    for _ in range(25):
        data = damaged(made.getvalue(), fault, rng)
        decoded, checked = complaint(decode_image, data), complaint(check_image, data)
        assert (decoded is None) == (checked is None), (decoded, checked)
        found += checked is not None
    # of a JPEG, which has no checksums, other numbers are other pixels
    assert found == 25 or (kind != "PNG" and fault != "cut")


def test_wrong_magic_and_zeros_are_no_images() -> None:
    whole = image(kind="JPEG")
    for data in (b"", bytes(500), b"GIF8" + whole[4:], b"<html>" + whole):
        assert "is no whole image" in str(complaint(check_image, data))
        assert "is no whole image" in str(complaint(decode_image, data))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_wav_of_every_kind(tmp_path: Path, rate: int, dtype: str) -> None:
    wave = tone(rate)
    scaled = {"uint8": wave * 127 + 128, "int16": wave * 32767, "int32": wave * (2**31 - 1), "float32": wave}[dtype]
    wavfile.write(tmp_path / "a.wav", rate, scaled.astype(dtype))
    (found,) = contents(open_raw(tmp_path))
    assert found.rate == rate
    assert np.allclose(found.samples, wave, atol=2e-2 if dtype == "uint8" else 1e-3)


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.stack([tone(8000), -tone(8000)], 1) * 20000
    wavfile.write(tmp_path / "a.wav", 8000, both.astype(np.int16))
    assert abs(contents(open_raw(tmp_path))[0].samples).max() < 1e-3


def test_flac(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="cenote[audio] is not installed")
    soundfile.write(tmp_path / "a.flac", tone(22050), 22050)
    (found,) = contents(open_raw(tmp_path))
    assert (found.rate, len(found.samples)) == (22050, 11025)
    data = (tmp_path / "a.flac").read_bytes()
    for broken in (data[:30], b"fLaC" + data[:10]):
        with pytest.raises(UnreadableError, match="is no whole sound file"):
            decode_audio(broken)


def test_broken_sounds(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "a.wav", 8000, (tone(8000) * 20000).astype(np.int16))
    whole = (tmp_path / "a.wav").read_bytes()
    for broken, message in (
        (whole[:-100], "is cut short"),
        (whole[:30], "is cut short"),
        (b"RIFF\0\0\0\0WAVE", "is no whole wav file"),
    ):
        with pytest.raises(UnreadableError, match=message):
            decode_audio(broken)
    wavfile.write(tmp_path / "b.wav", 8000, np.zeros(0, np.int16))
    with pytest.raises(UnreadableError, match=r"holds no sound|is no whole wav file"):
        decode_audio((tmp_path / "b.wav").read_bytes())


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo lines\n")
    items = open_raw(tmp_path / "a.txt")
    assert (items.kind, contents(items), [i.id for i in items.items]) == ("text", ["one", "two lines"], ["0", "1"])


def test_csv_with_quoted_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,sentence,label\nx,"a, ""quoted""\nline",1\ny,plain,0\n')
    items = open_raw(tmp_path / "a.csv")
    assert contents(items) == ['a, "quoted"\nline', "plain"]
    assert [i.id for i in items.items] == ["x", "y"]
    assert items.columns["label"] == ["1", "0"]


def test_tables_without_a_header_and_splits_by_file_name(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("good film\t1\nbad film\t0\n")
    (tmp_path / "dev.tsv").write_text("so so\t0\n")
    items = open_raw(tmp_path, names=["text", "label"])
    assert contents(items) == ["so so", "good film", "bad film"]
    assert items.columns == {"label": ["0", "1", "0"], "split": ["dev", "train", "train"]}


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "a b", "label": "x"}, {"text": None, "label": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = open_raw(tmp_path / "a.jsonl")
    assert items.items[0].read().content == "a b"
    with pytest.raises(UnreadableError, match="holds no text"):
        items.items[1].read()
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: is not JSON"):
        open_raw(tmp_path / "b.jsonl")


def test_parquet_texts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"review": ["a b", "c"], "label": [1, 0]}), tmp_path / "a.parquet")
    items = open_raw(tmp_path / "a.parquet")
    assert contents(items) == ["a b", "c"]
    assert list(items.columns["label"]) == [1, 0]
    pq.write_table(pa.table({"one": ["a"], "two": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"column: .* has several columns that may hold the items"):
        open_raw(tmp_path / "b.parquet")
    assert contents(open_raw(tmp_path / "b.parquet", column="two")) == ["b"]


def test_parquet_images(tmp_path: Path) -> None:
    cells = [{"bytes": image(c), "path": f"{c}.png"} for c in ("red", "blue")]
    pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / "a.parquet")
    items = open_raw(tmp_path / "a.parquet")
    assert items.kind == "image"
    assert [c.getpixel((0, 0)) for c in contents(items)] == [(255, 0, 0), (0, 0, 255)]


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="cenote[datasets] is not installed")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    parts = {
        name: datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        for name, texts, labels in (("train", ["a", "b c"], [0, 1]), ("test", ["d"], [1]))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    items = open_raw(tmp_path / "saved")
    assert contents(items) == ["a", "b c", "d"]
    assert items.class_names == {"label": ["bad", "good"]}
    assert list(items.columns["split"]) == ["train", "train", "test"]


def test_images_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="cenote[datasets] is not installed")
    pictures = [{"bytes": image(c), "path": None} for c in ("red", "blue")]
    made = datasets.Dataset.from_dict(
        {"photo": pictures, "label": [0, 1]},
        features=datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")}),
    )
    made.save_to_disk(tmp_path / "saved")
    items = open_raw(tmp_path / "saved")
    assert [c.getpixel((0, 0)) for c in contents(items)] == [(255, 0, 0), (0, 0, 255)]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file or folder"):
        open_raw(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds nothing that can be read"):
        open_raw(tmp_path / "empty")
    photos(tmp_path / "both", ["a.png"])
    wavfile.write(tmp_path / "both" / "a.wav", 8000, np.zeros(10, np.int16))
    with pytest.raises(InputError, match="holds 1 image, 1 audio; name one with kind"):
        open_raw(tmp_path / "both")
    assert len(open_raw(tmp_path / "both", kind="audio")) == 1
    with pytest.raises(InputError, match="kind: expected 'image', 'audio' or 'text', got"):
        open_raw(tmp_path / "both", kind="smell")
    with pytest.raises(InputError, match="limit: expected at least 1"):
        open_raw(tmp_path / "both", kind="audio", limit=0)


def test_limit_takes_the_first(tmp_path: Path) -> None:
    items = open_raw(photos(tmp_path, ["red/1.png", "red/2.png", "blue/3.png"]), limit=2)
    assert [i.id for i in items.items] == ["blue/3.png", "red/1.png"]
    assert items.columns == {"label": ["blue", "red"]}


def test_stamps_tell_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\ntwp\n")
    first, second = open_raw(tmp_path / "a.txt"), open_raw(tmp_path / "b.txt")
    assert first.sha256() == open_raw(tmp_path / "a.txt").sha256() != second.sha256()
