"""Lesion masks decoded fast: zlib takes nearly all of the time that Pillow needs for them, libdeflate a thirteenth.

Only what masks are, grey of 8 bits without interlacing, is decoded here; everything else, and every doubt, is Pillow's.

Source: Portable Network Graphics, third edition, W3C 2025: chunks (5.3), filters (9.2).
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import deflate
import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PLAIN = (8, 0, 0, 0, 0)  # bits, grey, deflate, the five filters, no interlacing
SUB, UP, PAETH = 1, 2, 4
PAETH_ROWS = 8  # undone in Python, 1 ms each; with more of them Pillow is as fast


def chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and data of every chunk.

    Raises:
        struct.error: the file ends within one.
    """
    place = len(SIGNATURE)
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        yield kind, content[place + 8 : place + 8 + length]
        place += length + 12


def undo_paeth(row: np.ndarray, above: np.ndarray) -> list[int]:
    """Values of a row that was stored as differences to the nearest of left, above and upper left."""
    values = []
    left = corner = 0
    for difference, up in zip(row.tolist(), above.tolist(), strict=True):
        to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
        nearest = left if to_left <= to_up and to_left <= to_corner else up if to_up <= to_corner else corner
        left, corner = (difference + nearest) & 255, up
        values.append(left)
    return values


def undo_filters(rows: np.ndarray) -> np.ndarray | None:
    """Pixels (H, W) of stored rows (H, 1 + W), the filter's number first; None where Pillow should do it."""
    kinds, pixels = rows[:, 0], rows[:, 1:].copy()
    if not np.isin(kinds, (0, SUB, UP, PAETH)).all() or (kinds == PAETH).sum() > PAETH_ROWS:
        return None
    for number in np.flatnonzero(kinds):
        row, above = pixels[number], pixels[number - 1] if number else np.zeros_like(pixels[0])
        if kinds[number] == SUB:
            np.cumsum(row, dtype=np.uint8, out=row)
        elif kinds[number] == UP:
            row += above
        else:
            row[:] = undo_paeth(row, above)
    return pixels


def read_grey(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """Decodes a PNG of grey values.

    Args:
        path: any file.
        size: width and height that it should have, in pixels.

    Returns:
        Picture of mode "L", or None: of another kind, another size, or broken, for Pillow to say which.
    """
    width, height = size
    content = path.read_bytes()
    try:
        found = list(chunks(content)) if content.startswith(SIGNATURE) else [(b"", b"")]
        if found[0] != (b"IHDR", struct.pack(">II5B", width, height, *PLAIN)) or found[-1][0] != b"IEND":
            return None
        data = b"".join(part for kind, part in found if kind == b"IDAT")
        stored = deflate.zlib_decompress(data, height * (1 + width))  # which checks its Adler-32
        pixels = undo_filters(np.frombuffer(stored, np.uint8).reshape(height, 1 + width))
    except (struct.error, deflate.DeflateError, ValueError):
        return None
    return None if pixels is None else Image.fromarray(pixels)
