"""Printed digits, rendered from fonts: the public data that the digits backbone is trained on.

The pictures go through the steps that made the handwritten set (Alpaydin and Kaynak, "Optical
Recognition of Handwritten Digits", UCI, 1998): a 32x32 bitmap, then the share of ink in each
block of 4x4. No handwriting is read here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Fonts are listed one by one: others that matplotlib ships map digits to symbols or placeholders,
# and fonts that a new version adds must not change what the backbone learns.
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
CLASSES = 10
_MASTER = 64
_GLYPH = 44
_BITMAP = 32
_BLOCK = 4


def render(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw printed digits in random fonts, shapes and strokes.

    Parameters
    ----------
    count : int
        Number of pictures.
    seed : int
        The same seed gives the same pictures.

    Returns
    -------
    images : Tensor
        Share of ink per pixel, fp32 in [0, 1], 1 is ink, shape (count, 1, 8, 8).
    labels : Tensor
        Digits, int64, shape (count,).
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    fonts = torch.randint(len(FONTS), (count,), generator=draw)
    bitmaps = _inked(_warped(_masters()[fonts, labels].unsqueeze(1), draw), draw)
    images = F.avg_pool2d(bitmaps, _BLOCK)
    contrast = _uniform(draw, count, 0.8, 1.0).view(-1, 1, 1, 1)
    return images * contrast, labels


@cache
def _masters() -> Tensor:
    """Return each font's ten digits, upright and of equal height; shape (fonts, 10, 64, 64)."""
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sheet = np.zeros((len(FONTS), CLASSES, _MASTER, _MASTER), dtype=np.float32)
    for row, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), size=2 * _MASTER)
        for digit in range(CLASSES):
            canvas = Image.new("L", (4 * _MASTER, 4 * _MASTER))
            ImageDraw.Draw(canvas).text((_MASTER, _MASTER), str(digit), fill=255, font=font)
            glyph = canvas.crop(canvas.getbbox())
            width = round(glyph.width * _GLYPH / glyph.height)
            small = glyph.resize((width, _GLYPH), Image.Resampling.BOX)
            left, top = (_MASTER - width) // 2, (_MASTER - _GLYPH) // 2
            sheet[row, digit, top : top + _GLYPH, left : left + width] = np.asarray(small) / 255
    return torch.from_numpy(sheet)


def _warped(glyphs: Tensor, draw: torch.Generator) -> Tensor:
    """Turn, shear, stretch, shift and bend glyphs; (n, 1, 64, 64) to (n, 1, 32, 32)."""
    count = len(glyphs)
    grid = F.affine_grid(_affine(count, draw), [count, 1, _BITMAP, _BITMAP], align_corners=False)
    strength = _uniform(draw, count, 0.0, 0.12).view(-1, 1, 1, 1)
    knots = torch.randn((count, 2, 4, 4), generator=draw) * strength
    bend = F.interpolate(knots, size=(_BITMAP, _BITMAP), mode="bicubic", align_corners=True)
    return F.grid_sample(glyphs, grid + bend.permute(0, 2, 3, 1), align_corners=False)


def _affine(count: int, draw: torch.Generator) -> Tensor:
    """Return maps from the bitmap to the master, shape (count, 2, 3)."""
    angle = _uniform(draw, count, -0.2, 0.2)
    shear = _uniform(draw, count, -0.25, 0.25)
    # The grid runs from -1 to 1, so this factor makes a glyph as high as the bitmap.
    fill = _GLYPH / _MASTER
    wide = fill * _uniform(draw, count, 1.0, 1.7)
    high = fill * _uniform(draw, count, 0.95, 1.1)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([wide * cos, wide * (shear * cos - sin), _uniform(draw, count, -0.08, 0.08)]),
        torch.stack([high * sin, high * (shear * sin + cos), _uniform(draw, count, -0.06, 0.06)]),
    ]
    return torch.stack(rows).permute(2, 0, 1)


def _inked(bitmaps: Tensor, draw: torch.Generator) -> Tensor:
    """Blur, then threshold: a low threshold thickens the stroke, a high one thins it."""
    count = len(bitmaps)
    blurred = F.avg_pool2d(bitmaps, 3, stride=1, padding=1)
    blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1)
    # The blur makes thin strokes faint; without rescaling, the threshold would erase them.
    relative = blurred / blurred.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    threshold = _uniform(draw, count, 0.12, 0.4).view(-1, 1, 1, 1)
    sharpness = _uniform(draw, count, 2.5, 10.0).view(-1, 1, 1, 1)
    return ((relative - threshold) * sharpness + 0.5).clamp(0.0, 1.0) * (relative > 0.02)


def _uniform(draw: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=draw)
