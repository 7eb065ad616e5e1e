"""`cenote extract`, `cenote models show`, `cenote probe --backbone`."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.cli.program import Run

QUICK = ["--methods", "mean,max", "--seeds", "1", "--epochs", "2", "--folds", "1"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.RandomState(0)
    for i in range(30):
        place = tmp_path / "photos" / ("bright" if i % 2 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.randint(0, 128, (20, 20, 3)) + (127 if i % 2 else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return tiny.vit(tmp_path / "vit")


def test_models_show(cenote: Run, vit: Path) -> None:
    code, out, _ = cenote("models", "show", vit)
    assert code == 0
    for words in ("ViTModel of transformers", "17 x 32 in every layer", "4 x 4", "0 to 3", "preprocessing: image_mean"):
        assert words in out
    found = json.loads(cenote("models", "show", vit, "--json")[1])
    assert found["layout"]["prefix_tokens"] == 1
    code, _, err = cenote("models", "show", vit / "nothing")
    assert code == 2
    assert "there is no folder" in err


def test_models_show_what_can_be_edited(cenote: Run, vit: Path) -> None:
    out = cenote("models", "show", vit)[1]
    assert "hidden states: layers" in out
    assert "self-attention: layers" in out
    assert "4 heads of blocks 0-2, by sdpa: rows, maps, heads' outputs" in out
    live = json.loads(cenote("models", "show", vit, "--json")[1])["live"]
    assert live["blocks"] == {"layers": 3}
    (found,) = live["attention"]
    assert (found["kind"], found["stack"], found["blocks"]) == ("self", "layers", [0, 1, 2])
    assert (found["heads"], found["kv_heads"], found["attention"], found["why_not"]) == (4, 4, "sdpa", None)
    assert {"rows", "weights", "context", "allowed"} <= set(found["edits"])


def test_models_show_keys_shared_by_heads_and_attention_that_is_out_of_reach(cenote: Run, tmp_path: Path) -> None:
    llama = tiny.made(tmp_path / "llama", "LlamaModel", tiny.words, **tiny.TEXT, num_key_value_heads=2)
    assert "4 heads on 2 of keys of blocks 0-2" in cenote("models", "show", llama)[1]
    settings = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}
    bloom = tiny.made(tmp_path / "bloom", "BloomModel", tiny.words, **settings)
    live = json.loads(cenote("models", "show", bloom, "--json")[1])["live"]
    assert live["blocks"] == {"h": 2}
    assert live["attention"][0]["edits"] == []
    assert "BloomAttention writes it out" in live["attention"][0]["why_not"]
    assert "not reached: BloomAttention writes it out" in " ".join(cenote("models", "show", bloom)[1].split())


def test_models_show_all_of_a_model_and_not_only_its_encoder(cenote: Run, tmp_path: Path) -> None:
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    t5 = tiny.made(tmp_path / "t5", "T5Model", tiny.words, **settings, decoder_start_token_id=0)
    live = json.loads(cenote("models", "show", t5, "--json")[1])["live"]
    assert live["blocks"] == {"encoder.block": 2, "decoder.block": 2}
    assert [(at["kind"], at["stack"]) for at in live["attention"]] == [
        ("self", "encoder.block"),
        ("self", "decoder.block"),
        ("cross", "decoder.block"),
    ]


def test_extract_then_probe(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    command = ("extract", photos, "--backbone", vit, "--out", tmp_path / "tokens", "--layers", "all")
    code, out, _ = cenote(*command, "--dry-run")
    assert code == 0
    assert "30 items, 510 tokens, 130.6 kB in 1 shards" in out
    assert not (tmp_path / "tokens").exists()
    code, out, err = cenote(*command)
    assert (code, err) == (0, "")
    assert "30 items, 510 tokens" in out
    assert "0 shards made, 1 kept" in cenote(*command)[1]
    code, out, err = cenote(*command, "--json")
    found = json.loads(out)
    assert (code, found["store"], found["items"], found["tokens"]) == (0, str(tmp_path / "tokens"), 30, 510)
    assert (found["shards_made"], found["shards_kept"], found["skipped"]) == (0, 1, {})
    assert "0 shards made, 1 kept" in err
    assert json.loads(cenote(*command, "--dry-run", "--json")[1])["tokens"] == 510
    code, out, _ = cenote("probe", tmp_path / "tokens", "--out", tmp_path / "report", *QUICK)
    assert code == 0
    assert "feature store, image through" in out
    assert (tmp_path / "report" / "report.html").is_file()
    code, out, _ = cenote("predict", tmp_path / "report" / "best", tmp_path / "tokens", "--out", tmp_path / "p.csv")
    assert "30 predictions" in out


def test_probe_of_raw_files_in_one_go(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    command = ("probe", photos, "--backbone", vit, "--out", tmp_path / "report", *QUICK)
    code, out, err = cenote(*command)
    assert (code, err) == (0, "")
    assert "photos: 30 items" in out
    assert (tmp_path / "report" / "report.html").is_file()
    assert "0 shards made, 1 kept" in cenote(*command)[1]


def test_probe_of_raw_files_at_several_layers(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    code, out, err = cenote(
        "probe", photos, "--backbone", vit, "--layers", "1,3", "--out", tmp_path / "report", *QUICK
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "max@1" in out
    assert "max@3" in out


def test_bad_files_are_listed(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    (photos / "dark" / "2.png").write_bytes(b"no image")
    command = ("extract", photos, "--backbone", vit, "--out", tmp_path / "tokens")
    code, _, err = cenote(*command)
    assert code == 2
    assert "item 'dark/2.png' is no whole image" in err
    code, out, _ = cenote(*command, "--skip-bad")
    assert code == 0
    assert "1 unreadable items were left out:\n  dark/2.png: is no whole image" in out


def test_wrong_input(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--backbone", vit, "--engine", "abacus"], "engine: expected local or ray"),
        (["--backbone", vit, "--layers", "9"], "layers: there is no layer 9"),
        (["--backbone", vit, "--dtype", "int8"], "dtype: expected 'float16', "),
        (["--backbone", vit, "--pool-at-extract", "abmil"], "has weights that must be trained first"),
        (["--backbone", tmp_path / "nowhere"], "there is no folder"),
    ):
        code, _, err = cenote("extract", photos, "--out", tmp_path / "tokens", *arguments)
        assert (code, err.startswith("error: ")) == (2, True)
        assert message in err
    code, _, err = cenote("probe", photos)
    assert code == 2
    assert "--backbone" in err
    table = tmp_path / "reviews.csv"
    table.write_text("text\ngood\nbad\n")
    code, _, err = cenote("probe", table)
    assert code == 2
    assert "--backbone" in err


def test_missing_labels_are_told_before_the_model_runs(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        file.rename(photos / f"{i}.png")
    code, _, err = cenote("probe", photos, "--backbone", vit, "--out", tmp_path / "out")
    assert code == 2
    assert "labels: the data hold none; give a CSV file" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "9"], "layers: there is no layer 9"),
        (["--layers", "1 2"], "layers: expected last, all, or numbers"),
        (["--layers", "0,3-1"], "layers: expected last, all, or numbers"),
        (["--metric", "smell"], "metric: 'smell' does not fit a binary task"),
        (["--significance", "none"], "significance: expected permutation or wilcoxon"),
        (["--grid", "9x9"], "grid: with --backbone, the model says how its tokens lie"),
        (["--prefix-tokens", "2"], "prefix-tokens: with --backbone, the model says"),
        (["--vectors", "x"], "vectors: with --backbone, the model says"),
    ],
)
def test_what_a_probe_cannot_do_is_told_before_the_model_runs(
    cenote: Run, photos: Path, vit: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = cenote("probe", photos, "--backbone", vit, "--out", tmp_path / "out", *arguments)
    assert (code, err.startswith("error: ")) == (2, True)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_finds_what_the_run_would(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for out, message in (("file", "is a file"), ("file/tokens", "is a file"), ("full", "not empty")):
        for dry in ([], ["--dry-run"]):
            code, _, err = cenote("extract", photos, "--backbone", vit, "--out", tmp_path / out, *dry)
            assert code == 2
            assert message in err
    cenote("extract", photos, "--backbone", vit, "--out", tmp_path / "tokens")
    command = ("extract", photos, "--backbone", vit, "--out", tmp_path / "tokens", "--dry-run")
    assert cenote(*command)[0] == 0
    code, _, err = cenote(*command, "--layers", "all")
    assert code == 2
    assert "layers: [3] in the store, [0, 1, 2, 3] now" in err


def test_names_with_brackets_and_colons_are_printed_as_they_are(
    cenote: Run, photos: Path, vit: Path, tmp_path: Path
) -> None:
    (photos / "dark" / "a[b] [").mkdir()
    (photos / "dark" / "a[b] [" / "x].png").write_bytes(b"no image")
    (photos / "dark" / "c[").mkdir()
    (photos / "dark" / "c[" / "red]:smile:.png").write_bytes(b"no image")
    odd = tmp_path / "my [" / "bold] data"
    odd.parent.mkdir()
    photos.rename(odd)
    vit.rename(tmp_path / "vit[red]")
    command = (odd, "--backbone", tmp_path / "vit[red]", "--skip-bad")
    code, out, _ = cenote("extract", *command, "--out", tmp_path / "tokens[" / "red]")
    assert code == 0
    assert "dark/a[b] [/x].png: is no whole image" in out
    assert "dark/c[/red]:smile:.png: is no whole image" in out
    assert "tokens[/red] (1 shards made" in out
    assert "vit[red]" in cenote("models", "show", tmp_path / "vit[red]")[1]
    code, out, _ = cenote("probe", *command, "--out", tmp_path / "report[" / "red]", *QUICK)
    assert code == 0
    assert "bold] data: AUROC on" in out
    assert "report[/red]/report.html" in out


def test_what_may_not_be_read_is_named(cenote: Run, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text("text\ngood\n")
    read_text = Path.read_text

    def refusing(self: Path, *arguments: object, **options: object) -> str:
        if self == table:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return read_text(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refusing)
    code, _, err = cenote("extract", table, "--backbone", vit, "--out", tmp_path / "tokens")
    assert (code, err) == (2, f"error: {table}: Permission denied; allow it, or name another\n")
    (vit / "model.safetensors").unlink()
    (vit / "model.safetensors").symlink_to("gone")
    code, _, err = cenote("models", "show", vit)
    assert code == 2
    assert "model.safetensors may not be read, or is a link that leads nowhere" in err


def test_items_none_of_which_can_be_read(cenote: Run, photos: Path, vit: Path, tmp_path: Path) -> None:
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no image")
    command = ("extract", photos, "--backbone", vit, "--out", tmp_path / "tokens", "--skip-bad")
    for more in (["--dry-run"], []):
        code, _, err = cenote(*command, *more)
        assert code == 2
        assert "error: data: none of 30 " in err
        assert "items can be read; the first, 'bright/1.png', is no whole image" in err


def test_a_tilde_is_the_home_folder(
    cenote: Run, photos: Path, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(vit)
    assert cenote("extract", "~/photos", "--backbone", vit, "--out=~/tokens")[0] == 0
    assert (tmp_path / "tokens" / "items.parquet").is_file()
    assert cenote("probe", "~/tokens", "--out=~/report", *QUICK)[0] == 0
    assert (tmp_path / "report" / "report.html").is_file()
    assert not (vit / "~").exists()
