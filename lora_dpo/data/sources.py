"""What a user may name as a source: files, folders, hub ids, data in memory, and mixtures."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_dpo.data.problems import Problems, listing
from lora_dpo.data.readers import KNOWN, Raw, Table, is_known, read_file
from lora_dpo.data.records import Origin
from lora_dpo.data.report import excerpt
from lora_dpo.errors import DataError


class DatasetLike(Protocol):
    """A ``datasets.Dataset`` or ``DatasetDict``, without importing the library for its name."""

    @property
    def column_names(self) -> Any:
        """Names of the columns."""


Source = str | Path | DatasetLike | Mapping[str, Any] | Sequence[Any]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SPEC_KEYS = {"path", "weight", "split"}
_MEMORY = "<memory>"


@dataclass(frozen=True)
class Spec:
    """One source: where it is, how often its rows are seen per epoch, which split of it."""

    place: Any
    weight: float = 1.0
    split: str | None = None


def specs(source: Any, split: str | None) -> list[Spec]:
    """Return the single sources that a user's ``source`` names, with a default split."""
    if _is_sequence(source) and not _is_rows(source):
        if not source:
            raise DataError("the list of sources is empty; give a file, a folder or a hub id.")
        return [_spec(item, split) for item in source]
    return [_spec(source, split)]


def as_path(given: str | Path) -> Path:
    """Return the path that a user named, with ``~`` resolved.

    Raises:
        DataError: it is empty, or nothing that a file could be called.
    """
    text = str(given)
    try:
        if not text.strip() or "\0" in text:
            raise ValueError("it is empty" if not text.strip() else "it holds a NUL character")
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path  # a hub id, or a mistake that is told later
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{excerpt(text)!r}: is no path ({excerpt(str(error))}); expected a file, a folder or a hub id."
        ) from None
    return path


def open_spec(spec: Spec, problems: Problems) -> list[Table]:
    """Read one source, as one table per file."""
    place = spec.place
    if isinstance(place, str | Path):
        return _open_path(as_path(place), str(place), spec.split, problems)
    if _is_sequence(place):
        _refuse_split(spec, "rows in memory")
        return [_memory_table(place, problems)]
    return [_dataset_table(place, spec.split, _MEMORY)]


def _spec(item: Any, split: str | None) -> Spec:
    if isinstance(item, Mapping) and _is_spec(item) and not _is_dataset_dict(item):
        unknown = set(item) - _SPEC_KEYS
        if unknown:
            raise DataError(
                f"source {item['path']}: unknown key {listing(sorted(map(str, unknown)))}; a "
                "source has path, weight and split."
            )
        return _checked(item["path"], item.get("weight", 1.0), item.get("split") or split)
    if hasattr(item, "path") and not isinstance(item, str | Path):
        weight = getattr(item, "weight", 1.0)
        return _checked(item.path, weight, getattr(item, "split", None) or split)
    return _checked(item, 1.0, split)


def _checked(place: Any, weight: Any, split: str | None) -> Spec:
    name = place if isinstance(place, str | Path) else _MEMORY
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < float("inf"):
        raise DataError(
            f"source {name}: weight is {weight!r}; a number above 0 is expected (2 shows each row "
            "twice per epoch, 0.5 shows half of the rows)."
        )
    known = isinstance(place, str | Path) or _is_sequence(place) or _is_dataset(place)
    if not known and not _is_dataset_dict(place):
        raise DataError(
            f"source: {type(place).__name__} is not a source; expected a path, a hub id, a list of "
            "dicts, a datasets.Dataset (a streamed one must be made into a Dataset first), or "
            "{'path': ..., 'weight': ..., 'split': ...}."
        )
    return Spec(place, float(weight), split)


def _open_path(path: Path, given: str, split: str | None, problems: Problems) -> list[Table]:
    if path.is_dir():
        return _open_folder(path, split, problems)
    if path.exists():
        _refuse_split(Spec(path, split=split), "a single file")
        return [read_file(path, problems)]
    if _HUB_ID.fullmatch(given) and not is_known(path) and not path.parent.is_dir():
        return [_hub_table(given, split)]
    raise DataError(f"{given}: no such file or folder.{_neighbour(path)}")


def _open_folder(folder: Path, split: str | None, problems: Problems) -> list[Table]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return [_saved_table(folder, split)]
    # `datasets` keeps dataset_info.json, and tools keep settings, beside the rows.
    found = sorted(p for p in folder.rglob("*") if p.is_file() and is_known(p) and _is_data(p))
    found = [p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts)]
    if not found:
        raise DataError(f"{folder}: a folder without data; expected files named {KNOWN}.")
    if split is not None:
        names = [str(p.relative_to(folder)) for p in found]
        found = [p for p in found if _of_split(p.relative_to(folder), split)]
        if not found:
            raise DataError(
                f"{folder}: no file here is of the split {split!r}; files found: "
                f"{', '.join(names[:10])}."
            )
    return [read_file(path, problems) for path in found]


def _of_split(path: Path, split: str) -> bool:
    return split in path.parts[:-1] or bool(re.match(rf"{re.escape(split)}($|[-_.])", path.name))


def _is_data(path: Path) -> bool:
    return path.name not in ("dataset_info.json", "dataset_infos.json", "manifest.json")


def _saved_table(folder: Path, split: str | None) -> Table:
    datasets = importlib.import_module("datasets")

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder}: not readable as a saved dataset ({excerpt(str(error))})."
        ) from None
    return _dataset_table(saved, split, str(folder))


def _hub_table(name: str, split: str | None) -> Table:
    datasets = importlib.import_module("datasets")

    try:
        found = datasets.load_dataset(name, split=split)
    except ValueError as error:
        if split is not None and "split" in str(error).lower():
            raise DataError(f"{name}: split {split!r}: {excerpt(str(error), 300)}") from None
        raise DataError(
            f"{name}: cannot be loaded from the hub: {excerpt(str(error), 300)}"
        ) from None
    except Exception as error:
        raise DataError(
            f"{name}: neither a file or folder here nor a dataset reachable on the hub "
            f"({type(error).__name__}: {excerpt(str(error), 200)}). Check the name and the "
            "network, or download the file and give its path."
        ) from None
    return _dataset_table(found, None if split else split, name, split)


def _dataset_table(dataset: Any, split: str | None, name: str, chosen: str | None = None) -> Table:
    if _is_dataset_dict(dataset):
        available = list(dataset)
        if split is None and len(available) == 1:
            split = available[0]
        if split not in dataset:
            given = f"no split {split!r}" if split else "several splits and none chosen"
            raise DataError(
                f"{name}: {given}; splits here: {', '.join(map(str, available))}. Choose one with "
                "split."
            )
        dataset, chosen = dataset[split], split
    elif split is not None:
        _refuse_split(Spec(name, split=split), "a single dataset")
    if len(dataset) == 0:
        raise DataError(f"{name}: the dataset has no rows.")
    label = f"{name}[{chosen}]" if chosen else name
    try:
        rows = dataset.with_format(None).to_list()
    except Exception as error:
        raise DataError(f"{label}: rows cannot be read ({excerpt(str(error))}).") from None
    return Table(label, [Raw(Origin(label, i), row) for i, row in enumerate(rows, start=1)])


def _memory_table(rows: Sequence[Any], problems: Problems) -> Table:
    if not rows:
        raise DataError(f"{_MEMORY}: the list is empty; a list of dicts is expected.")
    table = []
    for number, row in enumerate(rows, start=1):
        origin = Origin(_MEMORY, number)
        if isinstance(row, Mapping) and all(isinstance(name, str) for name in row):
            table.append(Raw(origin, dict(row)))
        elif isinstance(row, Mapping):
            problems.add(origin, "a dict with a key that is no text; expected names of columns.")
        else:
            problems.add(origin, f"a {type(row).__name__}; expected a dict per row.")
    return Table(_MEMORY, table)


def _refuse_split(spec: Spec, what: str) -> None:
    if spec.split is not None:
        name = spec.place if isinstance(spec.place, str | Path) else _MEMORY
        raise DataError(
            f"{name}: split is {spec.split!r}, but this is {what} and has no splits; leave it out."
        )


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either; paths count from {Path.cwd()}."
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.3)
    if close:
        return f" The nearest name in {path.parent} is {close[0]!r}."
    return f" {path.parent} holds no file of a similar name."


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_rows(source: Any) -> bool:
    """Whether a list holds rows and not sources."""
    first = next(iter(source), None)
    return isinstance(first, Mapping) and not (_is_spec(first) or _is_dataset_dict(first))


def _is_spec(value: Mapping[str, Any]) -> bool:
    # A row may well have a column named path: then it has answers too.
    return "path" in value and not {"chosen", "rejected", "completion", "messages"} & set(value)


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "column_names") and hasattr(value, "with_format") and _has_length(value)


def _is_dataset_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and hasattr(value, "column_names")


def _has_length(value: Any) -> bool:
    return hasattr(value, "__len__")
