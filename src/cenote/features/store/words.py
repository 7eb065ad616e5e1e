"""The words that stored tokens of texts stand for, made from the texts where they lie when somebody looks."""

from __future__ import annotations

from collections.abc import Sequence

from cenote.core import InputError
from cenote.features.raw import UnreadableError, digest_of, text_at
from cenote.features.store.manifest import Manifest


class StoredWords:
    """A word for each token of an item.

    Args:
        manifest: of the store.
        files: where the texts lie, in cells of tables; `None` where the store does not say.
        stamps: of the texts: another text in the same cell is not theirs.
        lengths: tokens per item.
    """

    def __init__(
        self, manifest: Manifest, files: Sequence[str] | None, stamps: Sequence[str], lengths: Sequence[int]
    ) -> None:
        self.manifest = manifest
        self.files = files
        self.stamps = stamps
        self.lengths = lengths

    def __getitem__(self, item: int) -> tuple[str, ...]:
        """As many as it has tokens; see `cenote.models.words.Words`.

        Raises:
            UnreadableError: saying why they cannot be told.
        """
        if self.files is None:
            raise UnreadableError(
                "the store does not say where its texts lie; the cenote extract that made it, run again, adds that"
            )
        text = text_at(self.files[item])
        if digest_of(text.encode("utf-8", "surrogatepass")).hex() != self.stamps[item]:
            raise UnreadableError(f"another text stands at {self.files[item]} now")
        from cenote.models.words import words_of

        try:
            words = words_of(self.manifest.model, self.manifest.preprocessing)(text)
        except InputError as error:
            raise UnreadableError(str(error)) from error
        if len(words) != self.lengths[item]:
            raise UnreadableError(
                f"the tokenizer gives {len(words)} tokens where {self.lengths[item]} are stored; another version of it?"
            )
        return words
