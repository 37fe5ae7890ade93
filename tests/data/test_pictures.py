"""Pictures of every mode become the gray and the colors that they show."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedlora_flwr.data.pictures import eight_bits, pixels
from fedlora_flwr.data.sources import load_split
from fedlora_flwr.errors import InvalidValue

SIZE = {
    "input_size": (3, 2, 3),
    "interpolation": "nearest",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "border",
}
Color = tuple[int, int, int]
CONTROL: Color = (10, 120, 230)


def solid(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (3, 2), value)


def of_numbers(value: int, kind: str) -> Image.Image:
    return Image.fromarray(np.full((2, 3), value, dtype=kind))


def renamed(mode: str, value: int) -> Image.Image:
    """Return 16 bits in one of the modes that Pillow makes no array into."""
    kind = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (3, 2), np.full((2, 3), value, dtype=kind).tobytes(), "raw", mode)


def palette(mode: str = "P") -> Image.Image:
    made = solid("P", 1)
    made.putpalette([0, 0, 0, *CONTROL])
    return made if mode == "P" else made.convert(mode)


def see_through(hidden: int) -> Image.Image:
    """Return a palette of which one color is transparent."""
    made = palette()
    made.info["transparency"] = hidden
    return made


def half(color: Color) -> Color:
    """Return a color with alpha 51 of 255, a fifth, over white."""
    red, green, blue = (round(255 + (value - 255) / 5) for value in color)
    return red, green, blue


# Each mode of Pillow, and what a person sees; by how many levels ways to compute it may differ.
SHOWN: dict[str, tuple[Callable[[], Image.Image], Color, int]] = {
    "1": (lambda: solid("1", 1), (255, 255, 255), 0),
    "L": (lambda: solid("L", 77), (77, 77, 77), 0),
    "P": (palette, CONTROL, 0),
    "P transparent": (lambda: see_through(1), (255, 255, 255), 0),
    "P transparent elsewhere": (lambda: see_through(0), CONTROL, 0),
    "PA": (lambda: palette("PA"), CONTROL, 0),
    "RGB": (lambda: solid("RGB", CONTROL), CONTROL, 0),
    "RGBX": (lambda: solid("RGBX", (*CONTROL, 0)), CONTROL, 0),
    "RGBA": (lambda: solid("RGBA", (*CONTROL, 255)), CONTROL, 0),
    "RGBA half": (lambda: solid("RGBA", (*CONTROL, 51)), half(CONTROL), 1),
    "RGBA hidden": (lambda: solid("RGBA", (0, 0, 0, 0)), (255, 255, 255), 0),
    # Colors of this mode are multiplied by alpha already.
    "RGBa": (lambda: solid("RGBa", (2, 24, 46, 51)), half(CONTROL), 1),
    "LA": (lambda: solid("LA", (100, 51)), half((100, 100, 100)), 1),
    "La": (lambda: solid("La", (20, 51)), half((100, 100, 100)), 1),
    "CMYK": (lambda: solid("CMYK", (255, 0, 0, 0)), (0, 255, 255), 0),
    "CMYK black": (lambda: solid("CMYK", (9, 9, 9, 255)), (0, 0, 0), 0),
    "YCbCr": (lambda: solid("RGB", CONTROL).convert("YCbCr"), CONTROL, 2),
    "HSV": (lambda: solid("HSV", (85, 255, 200)), (0, 200, 0), 1),
    "LAB": (lambda: solid("LAB", (255, 128, 128)), (255, 255, 255), 1),
    "I;16": (lambda: of_numbers(257 * 77, "<u2"), (77, 77, 77), 0),
    "I;16 middle": (lambda: of_numbers(257 * 77 + 128, "<u2"), (77, 77, 77), 0),
    "I;16 above": (lambda: of_numbers(257 * 77 + 129, "<u2"), (78, 78, 78), 0),
    "I;16 white": (lambda: of_numbers(65_535, "<u2"), (255, 255, 255), 0),
    "I;16B": (lambda: of_numbers(257 * 77, ">u2"), (77, 77, 77), 0),
    "I;16L": (lambda: renamed("I;16L", 257 * 77), (77, 77, 77), 0),
    "I;16N": (lambda: renamed("I;16N", 257 * 77), (77, 77, 77), 0),
}
REFUSED = {
    "I": lambda: of_numbers(77, "<i4"),
    "F": lambda: of_numbers(77, "<f4"),
}


def encoded(picture: Image.Image) -> bytes | None:
    """Return a picture as a file that gives back its mode, if there is one."""
    for form in ("PNG", "TIFF"):
        stream = io.BytesIO()
        try:
            picture.save(stream, form)
        except (OSError, ValueError, KeyError):
            continue
        if Image.open(stream).mode == picture.mode:
            return stream.getvalue()
    return None


@pytest.mark.parametrize("mode", SHOWN)
def test_a_picture_is_what_a_person_sees(mode: str) -> None:
    make, color, away = SHOWN[mode]
    assert make().mode == mode.split()[0]
    for wanted, expected in (("RGB", color), ("L", None)):
        picture = eight_bits(make(), wanted)
        found = np.asarray(picture).astype(int)
        if expected is None:  # Gray is weighted as broadcasting does it (ITU-R 601).
            expected = round(float(np.dot(color, (0.299, 0.587, 0.114))))  # type: ignore[assignment]
        assert picture.mode == wanted
        assert abs(found - np.array(expected)).max() <= away + (wanted == "L"), found


def test_every_mode_of_pillow_is_in_the_test() -> None:
    from PIL import ImageMode

    stated = {mode.split()[0] for mode in (*SHOWN, *REFUSED)}
    assert stated == set(Image.MODES) | {"LA", "PA", "RGBX", "RGBa", "La", "I;16", "I;16L"} | {
        "I;16B",
        "I;16N",
    }
    assert all(ImageMode.getmode(mode) for mode in stated)


@pytest.mark.parametrize("form", ["folder", "structure", "bytes"])
def test_all_modes_from_files(form: str, tmp_path: Path, empty_cache: Path) -> None:
    """Each stands beside a control, a plain picture, that must stay as it is."""
    control = encoded(solid("RGB", CONTROL))
    files = {mode: encoded(make()) for mode, (make, _, _) in SHOWN.items()}
    stored = {mode: content for mode, content in files.items() if content}
    assert len(stored) >= 18, "the modes that files have"
    both = [each for content in stored.values() for each in (content, control)]
    if form == "folder":
        place = tmp_path / "set" / "train" / "a"
        place.mkdir(parents=True)
        for number, content in enumerate(both):
            ending = "png" if content and content.startswith(b"\x89PNG") else "tiff"
            (place / f"{number:03d}.{ending}").write_bytes(content or b"")
    else:
        (tmp_path / "set").mkdir()
        values: list[Any] = (
            both if form == "bytes" else [{"bytes": each, "path": None} for each in both]
        )
        pq.write_table(pa.table({"image": values}), tmp_path / "set" / "train.parquet")
    found = pixels(load_split(str(tmp_path / "set"), "train"), "image", SIZE)
    images = np.array(found["image"]).astype(int)
    assert images.shape == (len(both), 3, 2, 3)
    assert (images == images[:, :, :1, :1]).all()
    for number, mode in enumerate(stored):
        _, color, away = SHOWN[mode]
        assert abs(images[2 * number, :, 0, 0] - color).max() <= away, mode
        assert images[2 * number + 1, :, 0, 0].tolist() == list(CONTROL)


@pytest.mark.parametrize("mode", REFUSED)
@pytest.mark.parametrize("form", ["folder", "table"])
def test_values_without_a_range_are_refused_by_file(
    mode: str, form: str, tmp_path: Path, empty_cache: Path
) -> None:
    place = tmp_path / "set" / "train" / "a"
    place.mkdir(parents=True)
    solid("L", 3).save(place / "1.png")
    REFUSED[mode]().save(place / "2.tif")
    if form == "table":
        rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(place.iterdir())]
        (tmp_path / "table").mkdir()
        pq.write_table(pa.table({"image": rows}), tmp_path / "table" / "train.parquet")
    source = tmp_path / ("set" if form == "folder" else "table")
    where = r"2\.tif" if form == "folder" else r"record 1, counted from 0, of .*train\.parquet"
    with pytest.raises(InvalidValue, match=rf"{where}' cannot be used.*Save it with 8 or 16 bits"):
        pixels(load_split(str(source), "train"), "image", SIZE)


def two(first: Color, second: Color, form: str) -> bytes:
    stream = io.BytesIO()
    solid("RGB", first).save(stream, form, save_all=True, append_images=[solid("RGB", second)])
    return stream.getvalue()


def turned() -> bytes:
    """Return a picture of 2 by 3 that its notes say to turn, with another color in one row."""
    values = np.zeros((3, 2, 3), dtype=np.uint8)
    values[0] = CONTROL
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # A camera that was held upright: turn it to the right.
    Image.fromarray(values).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def hidden_gray() -> bytes:
    """Return 16 bits of gray of which one value is transparent."""
    stream = io.BytesIO()
    values = np.array([[0, 257, 514], [771, 1028, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(stream, "PNG", transparency=257)
    return stream.getvalue()


def test_frames_turned_pictures_and_hidden_gray(tmp_path: Path, empty_cache: Path) -> None:
    rows = [
        two(CONTROL, (0, 0, 0), "GIF"),
        two(CONTROL, (0, 0, 0), "TIFF"),
        turned(),
        hidden_gray(),
    ]
    pq.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    found = np.array(pixels(load_split(str(tmp_path), "train"), "image", SIZE)["image"])
    for frames in found[:2]:  # The first frame counts.
        assert frames[:, 0, 0].tolist() == list(CONTROL)
        assert (frames == frames[:, :1, :1]).all()
    # The row that was on top is the column on the right.
    assert found[2][:, 0, 2].tolist() == list(CONTROL)
    assert not found[2][:, :, :2].any()
    assert found[3][0].tolist() == [[0, 255, 2], [3, 4, 255]]
