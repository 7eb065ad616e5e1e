"""Bytes of an image or a sound file -> pixels or samples, or the reason why not."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cenote.core import InputError
from cenote.core.memory import MAX_ITEM_SIZE
from cenote.features.raw.items import Audio, UnreadableError

HIGHEST_RATE = 1_000_000
BYTES_PER_PIXEL = 8
"""That decoding an image and turning it into RGB takes, with the copies on the way."""
USUAL_RATE = 16_000
"""Samples a second that models take, as a rule: what is stored at a lower rate grows to that."""
LOUDEST = 2.0**31
"""Of floating-point samples: those of whole numbers, stored as they were, are no larger."""


def decode_image(data: bytes, most: int = MAX_ITEM_SIZE) -> Any:
    """A `PIL.Image` in RGB, turned as its EXIF tag says, transparent parts on white.

    Args:
        data: of the file.
        most: bytes that it may take while it is decoded, as its header says.

    Raises:
        UnreadableError: where the bytes are no whole image, or it takes more.
    """
    from PIL import Image, ImageOps

    with _told():
        image: Any = _opened(data, most)
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        # PIL would clip these at 255
        values = np.asarray(image, dtype=np.float64)
        low, high = (0.0, 65535.0) if image.mode.startswith("I") else (float(values.min()), float(values.max()))
        image = Image.fromarray(np.uint8(255 * np.clip((values - low) / max(high - low, 1e-12), 0, 1)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def check_image(data: bytes, most: int = MAX_ITEM_SIZE) -> None:
    """Whether `decode_image` can decode it, at less cost.

    A JPEG is decoded at an eighth of its size: all of its data are read, and what is wrong with them found, but few pixels
    made. Of a PNG the checksums are compared: they tell every change since it was written, but not what its writer did wrong.

    Raises:
        UnreadableError: where the bytes are no whole image, or it takes more than so many bytes.
    """
    from PIL import ImageOps

    with _told():
        image = _opened(data, most)
        if image.format == "PNG":
            return
        if image.format == "JPEG":
            image.draft(None, (1, 1))
        image.load()
        ImageOps.exif_transpose(image)


def decode_audio(data: bytes, most: int = MAX_ITEM_SIZE) -> Audio:
    """One channel, the mean of all, at the file's own rate.

    Args:
        data: of the file.
        most: bytes that it may take at the rate of a model, as its header says.

    Raises:
        UnreadableError: where the bytes are no whole sound, it is empty, or it takes more.
        InputError: where the format needs the extra `cenote[audio]`.
    """
    is_wav = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    samples, rate = _wav(data, most) if is_wav else _other(data, most)
    if samples.ndim == 2:
        samples = samples.mean(1)
    if not len(samples):
        raise UnreadableError("holds no sound: its length is 0")
    if not np.isfinite(samples).all():
        raise UnreadableError("holds NaN or infinite samples")
    if np.abs(samples).max() > LOUDEST:
        raise UnreadableError(f"holds samples of up to {np.abs(samples).max():.3g}; those of a sound are from -1 to 1")
    return Audio(np.ascontiguousarray(samples, dtype=np.float32), rate)


def resampled(sound: Audio, rate: int) -> Audio:
    """The same sound at another rate, filtered so that nothing folds over.

    >>> resampled(Audio(np.zeros(8000, np.float32), 8000), 16000).samples.shape
    (16000,)
    """
    if sound.rate == rate:
        return sound
    from scipy.signal import resample_poly

    common = math.gcd(sound.rate, rate)
    samples = resample_poly(sound.samples.astype(np.float64), rate // common, sound.rate // common)
    return Audio(samples.astype(np.float32), rate)


def require_affordable(bytes_taken: int, most: int, what: str) -> None:
    """Raise `UnreadableError` where an item would take more than it may.

    >>> require_affordable(3 * 10**9, 10**9, "is a sound of 1:00 h")
    Traceback (most recent call last):
    cenote.features.raw.items.UnreadableError: is a sound of 1:00 h, which takes 3.0 GB; the limit is 1.0 GB, see max_item_size
    """
    if bytes_taken > most:
        raise UnreadableError(
            f"{what}, which takes {bytes_taken / 1e9:.1f} GB; the limit is {most / 1e9:.1f} GB, see max_item_size"
        )


def _opened(data: bytes, most: int) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    width, height = image.size
    require_affordable(width * height * BYTES_PER_PIXEL, most, f"has {width:,} x {height:,} pixels")
    if image.format == "PNG":
        # without this PIL reads zeros at the end of a file as black, and does not miss the end of another
        image.verify()
        image = Image.open(io.BytesIO(data))
    return image


@contextmanager
def _told() -> Iterator[None]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # PIL refuses what is twice as large as what it warns of
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        pixels = "".join(re.findall(r"\((\d+) pixels\)", str(error))) or "too many"
        raise UnreadableError(f"has {pixels} pixels, which PIL refuses to decode; save it smaller") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Warning) as error:
        raise UnreadableError(f"is no whole image: {_first_line(error)}") from error


def _require_short(frames: int, channels: int, rate: int, most: int) -> None:
    seconds = frames / rate
    taken = round(seconds * max(rate, USUAL_RATE)) * channels * np.dtype(np.float32).itemsize
    require_affordable(taken, most, f"is {seconds:,.0f} seconds of {channels} channels at {rate:,} samples a second")


def _wav(data: bytes, most: int) -> tuple[Any, int]:
    from scipy.io import wavfile

    # scipy reads on where a file was cut; here that is an error
    declared = int.from_bytes(data[4:8], "little")
    if declared not in (0xFFFFFFFF, 0) and declared + 8 > len(data) + 1:
        raise UnreadableError(f"is cut short: {len(data):,} of {declared + 8:,} bytes are there")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, samples = wavfile.read(io.BytesIO(data))
    except (ValueError, TypeError, IndexError, EOFError, ZeroDivisionError, MemoryError, OSError) as error:
        raise UnreadableError(f"is no whole wav file: {_first_line(error)}") from error
    except Exception as error:  # struct.error, raised where the header ends early
        raise UnreadableError(f"is no whole wav file: {_first_line(error)}") from error
    if not 0 < rate <= HIGHEST_RATE:
        raise UnreadableError(f"claims a rate of {rate:,} samples a second; from 1 to {HIGHEST_RATE:,} are taken")
    _require_short(len(samples), samples.shape[1] if samples.ndim == 2 else 1, rate, most)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128, int(rate)
    if np.issubdtype(samples.dtype, np.integer):
        # 24 bits come as the upper part of 32
        return samples.astype(np.float64) / float(2 ** (8 * samples.dtype.itemsize - 1)), int(rate)
    return samples, int(rate)


def _other(data: bytes, most: int) -> tuple[Any, int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise InputError(
            "sound files other than wav need the package soundfile; pip install 'cenote[audio]', or save them as wav"
        ) from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            rate = sound.samplerate
            if not 0 < rate <= HIGHEST_RATE:
                raise UnreadableError(
                    f"claims a rate of {rate:,} samples a second; from 1 to {HIGHEST_RATE:,} are taken"
                )
            _require_short(sound.frames, sound.channels, rate, most)
            samples = sound.read(dtype="float32", always_2d=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnreadableError(f"is no whole sound file: {_first_line(error)}") from error
    return samples, int(rate)


def _first_line(error: BaseException) -> str:
    # an address in memory is another one each time; what is said of an item is kept in the store
    said = re.sub(r" ?<[^<>]* object at 0x[0-9a-f]+>", "", str(error)).strip()
    return (said.splitlines() or [type(error).__name__])[0]
