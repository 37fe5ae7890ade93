"""Made-up data files: of any type, encoding and order, with gaps, odd names, and damage."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from tests.data.data_oracle import Table

WORDS = ["None", "NA", "null", "nan", "", " ", "007", "1,000", "2024-01-02", "True", "1e3", "-"]
ODD = ['"', '""', "\n", "\r\n", ",", "\t", "é", "\u2028", "\x85", "𝄞", "'", "\\", "#", ";"]
TEXTS = st.one_of(
    st.sampled_from(WORDS),
    st.lists(st.sampled_from([*WORDS, *ODD, "so", "fine"]), max_size=4).map("".join),
    st.text(max_size=6),
)
CLASSES = st.sampled_from(
    [
        ["0", "1", "2"],
        ["0", "1", "", "NA"],
        ["1.0", "0.0", ""],
        ["0.5", "1"],
        ["+1", "-1", "0"],
        ["yes", "no", "None", "NA"],
        ["007", "7", "08"],
        ["true", "False", ""],
        ["TRUE", "null"],
        ["1", "x", ""],
        ["1000000", "3"],
        ["", "nan"],
        ["18446744073709551615", "1"],
        ["99999999999999999999", "1"],
        ["inf", "1.5"],
    ]
)
HEADERS = st.sampled_from(
    [
        ["text", "label"],
        ["label", "text"],
        ["id", "text", "label"],
        ["", "text", "label"],
        ["text", "label", "text"],
        ["text", "Label"],
        ["text", "more", "other", "label"],
        ["label", "label"],
        ["text ", "label"],
    ]
)


@st.composite
def rows(draw: st.DrawFn, header: list[str]) -> list[list[str]]:
    """Return cells of records, a class from a few where the header says so."""
    chosen, count = draw(CLASSES), draw(st.integers(0, 7))
    kinds = [st.sampled_from(chosen) if name == "label" else TEXTS for name in header]
    return [[draw(kind) for kind in kinds] for _ in range(count)]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a file as it is, mostly, or cut off, or with bytes changed."""
    how = draw(st.sampled_from(["whole"] * 6 + ["cut", "byte", "doubled"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:place]
    if how == "byte":
        return content[:place] + draw(st.binary(max_size=2)) + content[place + 1 :]
    return content[:place] + content if how == "doubled" else content


@st.composite
def csv_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["train.csv", "train.tsv", "train.CSV"]))
    separator, header = "\t" if name.endswith("tsv") else ",", draw(HEADERS)
    stream = io.StringIO()
    quoting: Any = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)
    for row in [header, *draw(rows(header))]:
        if draw(st.integers(0, 40)) == 0:
            row = row[:-1] if draw(st.booleans()) else [*row, "x"]
        writer.writerow(row)
        if draw(st.integers(0, 20)) == 0:
            stream.write(end)
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "latin-1", "utf-16"]))
    content = stream.getvalue().encode(encoding, "ignore")
    return name, draw(damaged(content))


@st.composite
def json_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["train.jsonl", "train.json", "train.ndjson"]))
    header = draw(HEADERS)
    keys, lines = list(dict.fromkeys(header)), []
    numeric = draw(st.booleans())
    for row in draw(rows(keys)):
        record: dict[str, Any] = dict(zip(keys, row, strict=True))
        if numeric and "label" in record:
            record["label"] = _plain(record["label"])
        for key in keys:
            if draw(st.integers(0, 15)) == 0:
                record[key] = draw(st.sampled_from([None, 1, "a", 2.5, True, ["a"], {"b": "c"}]))
            elif draw(st.integers(0, 15)) == 0:
                del record[key]
        lines.append(json.dumps(record, ensure_ascii=draw(st.booleans())))
        if draw(st.integers(0, 30)) == 0:
            lines[-1] = lines[-1].replace("{", '{"label": 1, ', 1)
    if name == "train.json":
        text = "[" + draw(st.sampled_from([",", ",\n", " ,\r\n "])).join(lines) + "]"
    else:
        text = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines)
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16"]))
    return name, draw(damaged(text.encode(encoding, "surrogatepass")))


def _plain(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return None if cell == "" else cell


LABELS = st.sampled_from(
    [
        (st.integers(0, 3), pa.int64()),
        (st.integers(-1, 5), pa.int8()),
        (st.integers(0, 2), pa.uint16()),
        (st.sampled_from([0.0, 1.0, -1.0, math.nan]), pa.float64()),
        (st.sampled_from([0.5, 1.0]), pa.float32()),
        (st.booleans(), pa.bool_()),
        (st.sampled_from(WORDS), pa.string()),
        (st.sampled_from(["yes", "no", "NA"]), pa.large_string()),
        (st.sampled_from(["yes", "no", "None"]), pa.dictionary(pa.int8(), pa.string())),
        (st.just(datetime(2024, 1, 2)), pa.timestamp("ms")),
        (st.sampled_from([1, 2**40]), pa.int64()),
    ]
)


@st.composite
def parquet_files(draw: st.DrawFn) -> tuple[bytes, Table | None]:
    """Return a file, and the table that it holds, or ``None`` where it is not whole."""
    count, header = draw(st.integers(0, 7)), draw(HEADERS)
    arrays, columns = [], {}
    for name in header:
        kind, form = draw(LABELS) if name == "label" else (TEXTS, pa.string())
        gaps = st.one_of(kind, st.none()) if draw(st.booleans()) else kind
        values = draw(st.lists(gaps, min_size=count, max_size=count))
        arrays.append(pa.array(values, form))
        columns[name] = values
    stream, table = io.BytesIO(), pa.Table.from_arrays(arrays, names=header)
    groups = draw(st.sampled_from([1, 3, 100]))
    pq.write_table(table, stream, row_group_size=groups, compression="none")
    content = stream.getvalue()
    if draw(st.integers(0, 5)) == 0:
        return content[: draw(st.integers(0, len(content) - 1))], None
    whole = count and len(columns) == len(header)
    return content, Table(columns, [name for name in header if name != "label"]) if whole else None


PLACES = st.sampled_from(
    [
        "{}/{}.png",
        "{}/{}.PNG",
        "{}/{}.txt",
        "{}/.{}.png",
        "{}/more/{}.png",
        "{}{}.png",
        ".{}/{}.png",
    ]
)
FOLDERS = st.sampled_from(["a", "B", "c d", "007", "None", "\u00e9"])


def gray(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), value).save(stream, "PNG")
    return stream.getvalue()


@st.composite
def picture_folders(draw: st.DrawFn) -> dict[str, bytes]:
    """Return files by their places; a picture's gray is told by its name, some are broken."""
    found = {}
    for number in range(draw(st.integers(1, 6))):
        content = gray(number)
        if draw(st.integers(0, 12)) == 0:
            content = content[: draw(st.integers(0, len(content) - 20))]
        found[draw(PLACES).format(draw(FOLDERS), number)] = content
    return found
