"""The images that tokens came from, as the model saw them, read from where they lie when somebody looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST_SIDE = 224
UNDERSTOOD = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


class StoredPictures:
    """A picture per item, small; `None` where its file is gone, is another one now, or was prepared in an unknown way.

    Args:
        files: where the images lie, in files of their own or in cells of tables.
        digests: of their bytes, when they were extracted: no other picture is shown.
        sizes: of these bytes, where the store knows them.
        preprocessing: of the model, as the manifest has it: patches lie on what it left of an image.
    """

    def __init__(
        self,
        files: Sequence[str],
        digests: Sequence[bytes],
        sizes: Sequence[int | None],
        preprocessing: Mapping[str, Any],
    ) -> None:
        self.files = files
        self.digests = digests
        self.sizes = sizes
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> NDArray[np.uint8] | None:
        """`[height, width, 3]`."""
        from cenote.features.raw import UnreadableError

        try:
            return self.shown(item)
        except UnreadableError:
            return None

    def shown(self, item: int) -> NDArray[np.uint8]:
        """`[height, width, 3]`.

        Raises:
            UnreadableError: saying why there is no picture.
        """
        from cenote.features.raw import UnreadableError, bytes_at, digest_of
        from cenote.features.raw.decode import decode_image

        data = bytes_at(self.files[item], self.sizes[item])
        if digest_of(data) != self.digests[item]:
            raise UnreadableError("another file lies where its image lay")
        image = as_seen(decode_image(data), self.preprocessing)
        if image is None:
            raise UnreadableError("the model's way of cutting images is not known")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        return np.asarray(image, dtype=np.uint8)


def as_seen(image: Any, preprocessing: Mapping[str, Any]) -> Any:
    """An image resized and cut as a model's image processor does it; `None` where its settings say more than that.

    >>> from PIL import Image
    >>> as_seen(Image.new("RGB", (400, 200)), {"do_resize": True, "size": {"shortest_edge": 100}, "do_center_crop": True,
    ...     "crop_size": {"height": 80, "width": 80}}).size
    (80, 80)
    """
    if any(on is True and name.startswith("do_") and name not in UNDERSTOOD for name, on in preprocessing.items()):
        return None
    if "do_resize" not in preprocessing:
        return None
    if preprocessing["do_resize"]:
        size = _resized(image.size, preprocessing.get("size"))
        if size is None:
            return None
        image = image.resize(size)
    if preprocessing.get("do_center_crop"):
        cut = preprocessing.get("crop_size")
        if not isinstance(cut, Mapping) or not {"height", "width"} <= cut.keys():
            return None
        left, top = (image.width - cut["width"]) // 2, (image.height - cut["height"]) // 2
        image = image.crop((left, top, left + cut["width"], top + cut["height"]))
    return image


def _resized(size: tuple[int, int], wanted: Any) -> tuple[int, int] | None:
    given = {k: v for k, v in wanted.items() if v is not None} if isinstance(wanted, Mapping) else {}
    if given.keys() == {"height", "width"}:
        return int(given["width"]), int(given["height"])
    if given.keys() == {"shortest_edge"}:
        edge, shortest = int(given["shortest_edge"]), min(size)
        return int(size[0] * edge / shortest), int(size[1] * edge / shortest)
    return None
