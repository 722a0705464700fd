"""Files of rows: JSONL, JSON, CSV, TSV, Parquet and Arrow; the first four also compressed."""

from __future__ import annotations

import ast
import csv
import gzip
import importlib
import io
import json
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lora_dpo.data.problems import Problems, few
from lora_dpo.data.records import Origin
from lora_dpo.data.report import excerpt
from lora_dpo.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
KNOWN = (
    ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz or .zst behind it), .parquet and .arrow"
)


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as the file has it."""

    origin: Origin
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of one file, hub split or list."""

    name: str
    rows: list[Raw]

    @property
    def columns(self) -> list[str]:
        """All columns of all rows, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row.values))


def suffix_of(path: Path) -> str:
    """Return the suffix that tells the format, below any compression: ``a.jsonl.gz`` -> .jsonl."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def is_known(path: Path) -> bool:
    """Whether ``read_file`` has a reader for this name."""
    suffix, packed = suffix_of(path), path.name.lower().endswith(COMPRESSED)
    return suffix in TEXT_SUFFIXES or (suffix in TABLE_SUFFIXES and not packed)


def read_file(path: Path, problems: Problems) -> Table:
    """Read one file; broken lines go to ``problems``, a file that is no such file raises."""
    if not is_known(path):
        raise DataError(f"{path}: the kind of file is not known by its name; expected {KNOWN}.")
    _check_name(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); rows of preferences are expected.")
    suffix = suffix_of(path)
    rows = _read_arrow(path, suffix) if suffix in TABLE_SUFFIXES else _read_text(path, problems)
    if not rows and not problems.total:
        raise DataError(f"{path}: the file holds no rows; rows of preferences are expected.")
    return Table(str(path), rows)


def _check_name(path: Path) -> None:
    """Hold that a file's name is text: every row carries it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{str(path)!r}: the name of the file is not UTF-8; give it another name."
        ) from None


def _read_text(path: Path, problems: Problems) -> list[Raw]:
    suffix = suffix_of(path)
    try:
        with _open(path) as stream:
            if suffix in (".jsonl", ".ndjson"):
                return list(_json_lines(str(path), stream, problems))
            if suffix == ".json":
                return _json(str(path), stream.read(), problems)
            return _csv(path, stream, "\t" if suffix == ".tsv" else ",", problems)
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(str(path), error)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); is the file whole?") from None


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.lower().endswith(".zst"):
        pyarrow = importlib.import_module("pyarrow")

        try:
            return io.BytesIO(pyarrow.input_stream(str(path), compression="zstd").read())
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from None
    return path.open("rb")


def _json_lines(name: str, stream: BinaryIO, problems: Problems) -> Iterator[Raw]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows in strings.
    for number, line in enumerate(stream, start=1):
        origin = Origin(name, number)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            value = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.add(origin, f"not UTF-8 ({error.reason}); save the file as UTF-8.")
        except (ValueError, RecursionError) as error:
            problems.add(origin, f"not valid JSON ({error}); expected one object per line.")
        else:
            if isinstance(value, dict):
                yield Raw(origin, value)
            else:
                problems.add(
                    origin,
                    f"a JSON {_json_name(value)}; expected one object per line, such as "
                    '{"prompt": ..., "chosen": ..., "rejected": ...} (a file that is one JSON list '
                    "must be named .json).",
                )


def parse_json(text: str) -> Any:
    """Read JSON in which no object has a key twice: the first value would be lost unseen.

    Raises:
        ValueError: no JSON, a key given twice, or a number too long to be one.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {excerpt(twice, 40)!r} is given twice in one object")
    return values


def _json(name: str, data: bytes, problems: Problems) -> list[Raw]:
    text = data.decode("utf-8-sig")
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        # Many files named .json are JSON lines: their first line is an object by itself.
        if _is_object(text.lstrip().partition("\n")[0]):
            return list(_json_lines(name, io.BytesIO(data), problems))
        raise DataError(f"{name}: not valid JSON ({error}); expected a list of objects.") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict) and _is_object(text.strip().partition("\n")[0]):
        value = [value]  # JSON lines of a single line
    if not isinstance(value, list):
        keys = f" with the keys {few(map(repr, value))}" if isinstance(value, dict) else ""
        raise DataError(
            f"{name}: a JSON {_json_name(value)}{keys}; expected a list of objects, or an object "
            'with that list under "data".'
        )
    rows = []
    for number, item in enumerate(value, start=1):
        if isinstance(item, dict):
            rows.append(Raw(Origin(name, number), item))
        else:
            problems.add(Origin(name, number), f"a JSON {_json_name(item)}; expected an object.")
    return rows


def _csv(path: Path, stream: BinaryIO, delimiter: str, problems: Problems) -> list[Raw]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses cells above 128 KiB
    rows = []
    try:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        _refuse_repeated(str(path), reader.fieldnames or ())
        for number, values in enumerate(reader, start=1):
            origin = Origin(str(path), number)
            extra = values.pop(None, None)
            if extra is not None:
                problems.add(
                    origin,
                    f"has {len(extra)} cells more than the header; put text that holds "
                    f"{'tabs' if delimiter != ',' else 'commas'} in double quotes.",
                )
                continue
            rows.append(Raw(origin, {key: _cell(value) for key, value in values.items()}))
    except csv.Error as error:
        place = Origin(str(path), len(rows) + 1)
        raise DataError(f"{place}: not valid CSV ({error}); is a quote left open?") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _cell(value: str | None) -> Any:
    """Return a cell, or the messages it holds as JSON or as Python prints them."""
    if value is None or not value.lstrip().startswith(("[", "{")):
        return value
    for parse in (parse_json, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Python, about a text that is none of its own
                parsed = parse(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if _is_structure(parsed):
            return parsed
    return value


def _is_structure(value: Any) -> bool:
    if isinstance(value, list):
        # [better, worse] under "output" and [[question, answer], ...] under "history" count too.
        return bool(value) and all(isinstance(item, dict | list | str) for item in value)
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def _refuse_repeated(name: str, columns: Sequence[str]) -> None:
    """Refuse a column that stands twice; unnamed ones are what a spreadsheet leaves at the end."""
    twice = [column for column, count in Counter(columns).items() if count > 1 and column]
    if twice:
        raise DataError(
            f"{name}: the column {excerpt(twice[0], 40)!r} stands twice; give one of them another name."
        )


def _read_arrow(path: Path, suffix: str) -> list[Raw]:
    parquet = importlib.import_module("pyarrow.parquet")

    try:
        is_parquet = suffix == ".parquet"
        table = parquet.ParquetFile(path).read() if is_parquet else _arrow_table(path)
        _refuse_repeated(str(path), table.column_names)
        table.validate(full=True)  # a flipped bit in an offset would end the process, not raise
        rows = table.to_pylist()
    except DataError:
        raise
    except Exception as error:
        # Bytes of anyone's: besides its own errors pyarrow lets those of dates and zones through.
        raise DataError(
            f"{path}: not readable as {suffix[1:]} ({excerpt(str(error))}); is the file whole?"
        ) from None
    return [Raw(Origin(str(path), i), values) for i, values in enumerate(rows, start=1)]


def _arrow_table(path: Path) -> Any:
    pyarrow = importlib.import_module("pyarrow")

    # `datasets` writes the stream format, other tools write the file format under the same suffix.
    with pyarrow.OSFile(str(path)) as stream:
        opened = pyarrow.ipc.open_file if stream.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
        stream.seek(0)
        return opened(stream).read_all()


def _not_utf8(name: str, error: UnicodeDecodeError) -> str:
    return (
        f"{name}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8, "
        "for example with: iconv -f WINDOWS-1252 -t UTF-8."
    )


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except (ValueError, RecursionError):
        return False


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
