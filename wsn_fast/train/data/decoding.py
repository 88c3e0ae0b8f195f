"""Decodes one image with Pillow.

A file of some kilobytes can hold an image of gigabytes, so the size of an image is bounded before it is decoded. Only
PNG and JPEG are decoded: for other formats Pillow may start other programs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wsn_fast.train.data.files import DataError

_PIXELS = 1 << 24


def decode(
    image: Path | BinaryIO, where: str, mode: str = "RGB", size: tuple[int, int] | None = None
) -> np.ndarray[Any, Any]:
    """One image -> uint8 [H, W, 3] for the mode RGB, or [H, W] for L.

    Args:
        image: its file.
        where: what messages call it.
        mode: RGB or L.
        size: the height and the width that it is resized to; None keeps its own.

    Raises:
        DataError: it cannot be read, or is too large.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images are decoded with Pillow: pip install 'wsn-fast[images]'") from error
    try:
        if isinstance(image, Path) and not image.is_file():  # the end of a pipe may never come
            raise FileNotFoundError("it is no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the next line but one has a lower bound
            opened = Image.open(image, formats=("PNG", "JPEG"))
        with opened:
            if opened.width * opened.height > _PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are more than {_PIXELS}")
            converted = opened.convert(mode)
            if size is not None:
                converted = converted.resize(size[::-1], Image.Resampling.BICUBIC)
            return np.array(converted)
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        raise DataError(f"{where}: not a readable image ({type(error).__name__}: {error})") from error
