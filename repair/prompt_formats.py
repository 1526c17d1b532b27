"""Prompt files as analysts have them, read into the JSON form of `contract.md`.

JSON objects, BackdoorLLM's JSON lists (`instruction`, `input`, `output`), CSV with the columns
`clean` and `triggered`, and plain text with one prompt a line.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from repair.json_size import MOST_SENT, check_structure
from repair.records import RepairError

MAX_FILE_BYTES = 16 * 2**20
_FORMATS = (
    "Accepted: the JSON form of the README, BackdoorLLM's JSON lists, CSV with the columns "
    "clean,triggered, and plain text with one prompt a line."
)


def decode_file(path: Path) -> str:
    """Return the text of a prompt file; raises `RepairError` when it cannot be one."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RepairError(f"The prompt file {path} {what}. {_FORMATS}")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RepairError(f"The prompt file {path} cannot be read ({error.strerror}).") from None
    if len(raw) > MAX_FILE_BYTES:
        raise RepairError(
            f"The prompt file {path.name} is larger than {MAX_FILE_BYTES // 2**20} MiB. A few "
            "hundred prompts are enough; give a shorter file."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RepairError(
            f"The prompt file {path.name} is not UTF-8 text (byte {error.start}). Save it as "
            f"UTF-8. {_FORMATS}"
        ) from None


def read_text(text: str, *, name: str) -> dict[str, Any]:
    """Return the JSON form of a text in any accepted format, not yet checked."""
    if len(text) > MAX_FILE_BYTES:
        raise RepairError(f"The text is longer than {MAX_FILE_BYTES} characters; give less.")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        return {}
    suffix = Path(name).suffix.lower()
    if suffix == ".json" or (suffix not in (".csv", ".txt") and text.lstrip()[0] in "{["):
        return _read_json(text, name)
    delimiter = _csv_delimiter(text)
    if delimiter is not None and suffix != ".txt":
        return _read_csv(text, name, delimiter)
    if suffix == ".csv":
        raise RepairError(
            f"{name} has no columns named clean and triggered in its first line. {_FORMATS}"
        )
    lines = [line.strip() for line in text.split("\n")]
    return {"prompts": [line for line in lines if line]}


def _read_json(text: str, name: str) -> dict[str, Any]:
    try:
        check_structure(text.encode("utf-8", "surrogatepass"), *MOST_SENT)
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise RepairError(f"{name} is not valid JSON ({reason}). {_FORMATS}") from None
    if isinstance(flat, dict):
        inside = flat.get("prompts")  # of a request.json: the whole file as it was read
        return inside if isinstance(inside, dict) else flat
    if not isinstance(flat, list):
        raise RepairError(f"{name} holds neither a JSON object nor a list. {_FORMATS}")
    if all(isinstance(row, str) for row in flat):
        return {"prompts": flat}
    return {"prompts": [_join_row(row, i) for i, row in enumerate(flat, start=1)]}


def _join_row(row: Any, number: int) -> str:
    """Return the prompt of a BackdoorLLM row: the instruction, and its input on a new line."""
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
        raise RepairError(f"Row {number} of the list has no text named instruction. {_FORMATS}")
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise RepairError(f"Row {number} of the list has an input that is not text. {_FORMATS}")
    return f"{row['instruction']}\n{more}" if more.strip() else row["instruction"]


def _csv_delimiter(text: str) -> str | None:
    """Return the delimiter of a header line that names both columns, or None."""
    header = text.lstrip("\n").split("\n", 1)[0].lower()
    for delimiter in ",;\t":
        columns = {cell.strip().strip('"') for cell in header.split(delimiter)}
        if {"clean", "triggered"} <= columns:
            return delimiter
    return None


def _read_csv(text: str, name: str, delimiter: str) -> dict[str, Any]:
    lines = io.StringIO(text.lstrip("\n"), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    pairs = []
    try:
        columns = [cell.strip().lower() for cell in next(reader)]
        clean, triggered = columns.index("clean"), columns.index("triggered")
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(columns):
                raise RepairError(
                    f"Line {reader.line_num} of {name} has {len(row)} columns, the header "
                    f"{len(columns)}. Put texts that hold a {delimiter!r} in double quotes."
                )
            pairs.append({"clean": row[clean], "triggered": row[triggered]})
    except csv.Error as error:
        raise RepairError(
            f"Line {reader.line_num} of {name} is not valid CSV ({error}). {_FORMATS}"
        ) from None
    return {"pairs": pairs}
