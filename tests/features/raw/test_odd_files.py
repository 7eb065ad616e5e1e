"""Files and tables as people have them, and what they are told of those that cannot be used."""

import json
import os
import struct
import warnings
import zlib
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

TEXTS = ["good one", "bad one", "so so"]


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path)
    return path


def ids(items: RawItems) -> list[str]:
    return [item.id for item in items.items]


def contents(items: RawItems) -> list[Any]:
    return [item.read().content for item in items.items]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_linked_folders_are_read_and_loops_are_not(tmp_path: Path) -> None:
    photo(tmp_path / "elsewhere" / "1.png")
    photo(tmp_path / "photos" / "cat" / "2.png")
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere" / "itself").symlink_to(tmp_path / "elsewhere")
    items = open_raw(tmp_path / "photos")
    assert ids(items) == ["cat/2.png", "dog/1.png"]
    assert items.columns == {"label": ["cat", "dog"]}


def test_links_that_lead_nowhere_are_items_that_cannot_be_read(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("gone.png")
    (tmp_path / "c.png").symlink_to("c.png")
    os.mkfifo(tmp_path / "pipe.png")
    items = open_raw(tmp_path)
    assert ids(items) == ["a.png", "b.png", "c.png"]
    for item in items.items[1:]:
        with pytest.raises(UnreadableError, match="cannot be read"):
            item.check()


def test_folders_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "photos" / "cat" / "1.png")
    photo(tmp_path / "photos" / "dog" / "2.png")
    scandir = os.scandir

    def refusing(folder: Any) -> Any:
        if Path(folder).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"cannot read the folder .*dog \(Permission denied\)"):
        open_raw(tmp_path / "photos")


def test_names_that_are_no_text_are_told(tmp_path: Path) -> None:
    photo(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(InputError, match=r"the name of the file caf\\xe9.png is no UTF-8 text; rename it"):
        open_raw(tmp_path)


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "Thumbs.db", ".hidden", "labels.csv"):
        (tmp_path / name).write_text("id,label\na.png,1\n")
    assert open_raw(tmp_path).format == "folder of .png files; not read: 2 .heic, 1 .db"
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"holds nothing that can be read \(2 .heic, 1 .db, 1 .csv\); expected .jpg"):
        open_raw(tmp_path, kind="image")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.png", "is a single file; name the folder that it lies in"),
        ("a.json", "is no .txt, .csv, .*; write a line per object and call it .jsonl"),
        ("a.xlsx", "save it as CSV"),
    ],
)
def test_single_files_of_another_kind(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_raw(written(tmp_path / name, "[]"))


def test_texts_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "pos").mkdir()
    written(tmp_path / "pos" / "1.txt", "good\n")
    with pytest.raises(InputError, match=r"lie in its subfolders \(pos/1.txt, ...\); name one of these"):
        open_raw(tmp_path)


def test_splits_beside_other_folders_are_no_classes(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog", "extra/cat"):
        photo(tmp_path / folder / "1.png")
    with pytest.raises(InputError, match="holds test, train, which are splits, and extra, which is none"):
        open_raw(tmp_path)
    for vehicle in ("bus", "train"):
        photo(tmp_path / "vehicles" / vehicle / "old" / "1.png")
    assert open_raw(tmp_path / "vehicles").columns == {"label": ["bus", "train"]}


def test_a_file_beside_the_folders_that_are_classes_is_told(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", "logo.png"):
        photo(tmp_path / name)
    items = open_raw(tmp_path)
    assert not items.columns
    assert items.format == "folder of .png files; no labels, as logo.png lie beside the subfolders"


def test_a_store_is_no_raw_data(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is a feature store already"):
        open_raw(tmp_path)


def test_options_that_say_nothing_of_a_folder_of_images(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    for option in ({"column": "image"}, {"names": ["image"]}, {"id_column": "file"}):
        with pytest.raises(InputError, match=next(iter(option))):
            open_raw(tmp_path, **option)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="names: only CSV files"):
        open_raw(written(tmp_path / "a.txt", "a\n"), names=["text"])


def test_the_kind_chooses_among_columns(tmp_path: Path) -> None:
    data = photo(tmp_path / "a.png").read_bytes()
    pq.write_table(pa.table({"image": [data], "text": ["red"]}), tmp_path / "a.parquet")
    assert open_raw(tmp_path / "a.parquet").kind == "image"
    assert contents(open_raw(tmp_path / "a.parquet", kind="text")) == ["red"]
    with pytest.raises(InputError, match=r"kind: .* was to hold image, but column text of 1 .csv file is text"):
        open_raw(written(tmp_path / "a.csv", "text,label\na,1\n"), kind="image")
    (tmp_path / "a.parquet").unlink()
    assert contents(open_raw(tmp_path, kind="text")) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "text|label\ngood one|1\nbad one|0\nso so|1\n",
        '"text";"label, as given"\ngood one;1\nbad one;0\nso so;1\n',
        '"text" ,label\n"good one" ,1\nbad one,0\nso so,1\n',
    ],
)
def test_separators(tmp_path: Path, text: str) -> None:
    items = open_raw(written(tmp_path / "a.csv", text), column="text")
    assert contents(items) == TEXTS
    assert [list(cells) for cells in items.columns.values()] == [["1", "0", "1"]]


def test_quotes_in_tab_separated_files_stand_for_themselves(tmp_path: Path) -> None:
    text = 'text\tlabel\n"Great film\t1\nit\'s "ok"\t0\nawful "\t0\n"a ""b"" c"\t1\n'
    assert contents(open_raw(written(tmp_path / "a.tsv", text))) == ['"Great film', 'it\'s "ok"', 'awful "', 'a "b" c']
    text = 'text\tlabel\n"two\nlines"\t1\n'
    assert contents(open_raw(written(tmp_path / "a.tsv", text))) == ["two\nlines"]


def test_quotes_that_are_not_closed_swallow_no_lines(tmp_path: Path) -> None:
    for text in ('text,label\n"good,1\nbad,0\n', 'text,label\n"good,1\nit\'s "bad",0\nsoso,0\n'):
        with pytest.raises(InputError, match=r"line 2: .*a quote in a cell is not closed, or not doubled"):
            open_raw(written(tmp_path / "a.csv", text))


def test_lines_end_at_line_ends_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\u2028one\x85one\x0bone\r\ntwo\n\nthree".encode())
    assert len(open_raw(file)) == 3


def test_cells_that_are_no_texts(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", json.dumps({"data": {"text": "a"}, "label": 1}))
    with pytest.raises(InputError, match=r"'data' of .* holds an object of text in row 0, expected a text"):
        open_raw(file, column="data")
    pq.write_table(pa.table({"text": [["a"], ["b", "c"]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"'text' of .* holds a list in row 0"):
        open_raw(tmp_path / "a.parquet")


def test_halves_of_characters(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b \\ud83d", "label": "y"}\n')
    items = open_raw(file)
    assert len({item.stamp() for item in items.items}) == 2
    with pytest.raises(UnreadableError, match="holds half a character"):
        items.items[1].read()
    with pytest.raises(InputError, match=r"column 'label' holds half a character, .* in row 0"):
        open_raw(written(file, '{"text": "a", "label": "\\ud83d"}\n'))


def test_json_that_is_not_by_lines(tmp_path: Path) -> None:
    for text in (json.dumps([{"text": "a"}]), json.dumps([{"text": "a"}], indent=1), '{"text": "a"}\n{"text": "b'):
        with pytest.raises(InputError, match=r"line \d: .*on each line"):
            open_raw(written(tmp_path / "a.jsonl", text))


def test_tables_without_items_are_named(tmp_path: Path) -> None:
    for file in (written(tmp_path / "a.txt", "\n \n"), tmp_path / "a.parquet"):
        if file.suffix == ".parquet":
            pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
        with pytest.raises(InputError, match=rf"data: .*{file.name} holds no item"):
            open_raw(file)


def test_columns_of_parquet(tmp_path: Path) -> None:
    twice = pa.table([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="names a column twice: text, text"):
        open_raw(tmp_path / "twice.parquet")
    views = pa.table({"text": pa.array(TEXTS, pa.string_view()), "label": pa.array(TEXTS, pa.string_view())})
    pq.write_table(views, tmp_path / "views.parquet")
    items = open_raw(tmp_path / "views.parquet")
    assert contents(items) == TEXTS
    assert items.columns == {"label": TEXTS}


def test_the_kinds_of_files_that_were_read_together_are_told(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", "text\na\n")
    written(tmp_path / "b.jsonl", '{"text": "b"}\n')
    assert open_raw(tmp_path).format == "column text of 2 .csv, .jsonl files"


def blank(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all black."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" * (1 + (width + 7) // 8)) * height, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_large_images_are_read_and_bombs_are_not() -> None:
    check_image(blank(10_000, 9_500))
    for read in (check_image, decode_image):
        with pytest.raises(UnreadableError, match="has 400000000 pixels, which PIL refuses to decode; save it smaller"):
            read(blank(20_000, 20_000))


def test_sounds_of_rates_and_loudness_that_none_has(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    wavfile.write(file, 2**31 - 1, np.zeros(3, np.int16))
    with pytest.raises(UnreadableError, match="claims a rate of 2,147,483,647 samples a second; from 1 to 1,000,000"):
        decode_audio(file.read_bytes())
    wavfile.write(file, 16000, np.full(3, 1e30, np.float32))
    with pytest.raises(UnreadableError, match=r"holds samples of up to 1e\+30"):
        decode_audio(file.read_bytes())


def test_sounds_of_floating_point_numbers_cause_no_warning(tmp_path: Path) -> None:
    from cenote.models.audio import _at_rate

    wavfile.write(tmp_path / "a.wav", 16000, np.zeros(30, np.float32))
    sound = decode_audio((tmp_path / "a.wav").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(_at_rate(sound.samples, sound.rate, 16000)) == 30


def test_what_cenote_wrote_among_the_data_is_no_item(tmp_path: Path) -> None:
    photo(tmp_path / "cat" / "1.png")
    photo(tmp_path / "cenote-out" / "shown.png")
    (tmp_path / "cenote-out" / "comparison.json").write_text("{}")
    assert ids(open_raw(tmp_path)) == ["cat/1.png"]
