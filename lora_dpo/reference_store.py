"""Log-probs of references on disk, from where every run, objective and evaluation takes them.

FOLDER/<reference>/reference.json   what the reference is (``reference_identity``)
FOLDER/<reference>/<sha256>.logps   log-probs of answers; the name is the checksum of the content

A value is found again by its reference and by the tokens of one answer with its prompt, and by
nothing else. Files are written whole and never changed, so that a crash costs the newest rows alone
and several processes may fill one store.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_dpo.data import Tokenised
from lora_dpo.data.tokenising import ANSWERS
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import reference_identity
from lora_dpo.ranks import agreed, processes, share, wait
from lora_dpo.reference_cache import reference_batches, with_columns
from lora_dpo.sharding import is_sharded
from lora_dpo.showing import bar
from lora_dpo.store import fingerprint, lock, write_bytes, write_json

logger = logging.getLogger("lora_dpo")

# What a value is; another statistic or layout of the files is another store.
FORMAT = "1: summed log-prob of the completion, nats, float64"
RECORD = np.dtype([("key", "S16"), ("logp", "<f8")])
FLUSH_ROWS, FLUSH_SECONDS = 512, 30.0  # what a crash costs at most
MANY = 16  # files, from which on they are merged

Records = NDArray[Any]  # of RECORD, sorted by key
Keys = NDArray[np.bytes_]  # [rows, columns]
Table = NDArray[np.float64]  # [rows, columns]


def stored_reference_logps(
    policy: nn.Module,
    data: Tokenised,
    folder: str | Path,
    *,
    batch_size: int = 8,
    chunk: int = CHUNK_TOKENS,
) -> Tokenised:
    """Return the rows with their log-probs under the reference: from disk, or computed and stored.

    Args:
        policy: whose reference it is; its own adapters do not matter.
        data: tokenised rows; pairs and single answers share what is stored.
        folder: of the stores of all references.
        batch_size: rows of a forward pass, for what is not known yet.
        chunk: positions whose logits exist at one time.

    Raises:
        OutputError: the folder cannot be written.
    """
    store = ReferenceStore(policy, Path(folder))
    return store.rows_of(data, batch_size=batch_size, chunk=chunk)


def stored_rows(
    policy: nn.Module,
    objective: BoundObjective,
    sets: Sequence[Tokenised | None],
    folder: str | Path,
    *,
    batch_size: int,
    chunk: int,
) -> list[Tokenised | None]:
    """Return the sets of a run likewise, and say what was spared.

    Raises:
        ConfigError: the objective takes nothing from stored log-probs.
    """
    if problem := objective.needs_running_reference:
        raise ConfigError(f"reference_cache: given, but {problem}")
    if "mismatched" in objective.needs:
        logger.info(
            "reference log-probs: %s reads mismatched completions too; on these the reference still "
            "runs in every step",
            objective.name,
        )
    how: dict[str, Any] = {"batch_size": batch_size, "chunk": chunk, "together": True}
    with agreed():
        store = ReferenceStore(policy, Path(folder))
        return [data and store.rows_of(data, **how) for data in sets]


class ReferenceStore:
    """The stored log-probs of one reference.

    Args:
        policy: whose reference it is.
        folder: of the stores of all references.
    """

    def __init__(self, policy: nn.Module, folder: Path) -> None:
        began = time.monotonic()
        self.policy = policy
        facts = {"format": FORMAT, **reference_identity(policy)}
        self.folder = folder.absolute() / fingerprint(facts)[:32]
        try:
            if not (self.folder / "reference.json").is_file():  # a filled store may be read-only
                write_json(self.folder / "reference.json", facts)
        except OSError as error:
            raise OutputError(
                f"{folder}: the folder of reference log-probs cannot be written ({error}). Choose "
                "another train.reference_cache_dir, or leave train.cache_reference out."
            ) from None
        self.seconds = time.monotonic() - began

    def rows_of(
        self, data: Tokenised, *, batch_size: int, chunk: int, together: bool = False
    ) -> Tokenised:
        """Return the rows with all their log-probs, after computing and storing unknown ones.

        Args:
            data, batch_size, chunk: as in ``stored_reference_logps``.
            together: whether all processes do this now, each computing its share.
        """
        began = time.monotonic()
        keys = answer_keys(data)
        shards, damaged = self._read()
        known = _lookup(shards.values(), keys)
        unknown = int(np.isnan(known).sum())
        settings = {"batch_size": batch_size, "chunk": chunk}
        if together and processes() > 1:
            wait()  # until all have looked, before one of them writes
            if not is_sharded(self.policy):  # else they run every row together
                with agreed():
                    self._fill(data, keys, known, share(_rows_to_run(keys, known)), **settings)
                shards, damaged = self._read()
                known = _lookup(shards.values(), keys)
        if np.isnan(known).any():  # all of it, or what another process could not write
            self._fill(data, keys, known, _rows_to_run(keys, known), **settings)
        for path in damaged:  # what of it is needed stands in new files
            _remove_damaged(path)
        if len(shards) > MANY:
            self._merge()
        logger.info(
            "reference log-probs: %d answers, %d from %s, %d computed in %.1f s (reference "
            "identified in %.1f s)",
            keys.size, keys.size - unknown, self.folder, unknown, time.monotonic() - began,
            self.seconds,
        )  # fmt: skip
        return with_columns(data, torch.from_numpy(known))

    def _fill(
        self,
        data: Tokenised,
        keys: Keys,
        known: Table,
        rows: Sequence[int],
        *,
        batch_size: int,
        chunk: int,
    ) -> None:
        """Compute what is NaN of ``rows`` in ``known`` and write it there and to disk, each answer once."""
        values: dict[bytes, float] = {}
        done, pending, last = 0, {}, time.monotonic()
        try:
            with bar("reference log-probs", len(rows), "rows") as advance:
                for places, logps in reference_batches(
                    self.policy, data, rows, batch_size=batch_size, chunk=chunk
                ):
                    new = zip(keys[places].ravel().tolist(), logps.ravel().tolist(), strict=True)
                    for key, value in new:
                        if key not in values:
                            values[key] = pending[key] = value
                    done += len(places)
                    advance(len(places))
                    seconds = time.monotonic() - last
                    if seconds > FLUSH_SECONDS:
                        logger.info("reference log-probs: %d of %d rows", done, len(rows))
                    if len(pending) >= FLUSH_ROWS or seconds > FLUSH_SECONDS:
                        self._write(pending)
                        pending, last = {}, time.monotonic()
        finally:  # an interruption keeps what is there
            self._write(pending)
        for place in zip(*np.nonzero(np.isnan(known)), strict=True):
            known[place] = values.get(bytes(keys[place]), np.nan)

    def _write(self, values: dict[bytes, float]) -> None:
        finite = {key: value for key, value in values.items() if np.isfinite(value)}
        if not finite:
            return
        try:
            _write_records(self.folder, np.array(sorted(finite.items()), dtype=RECORD))
        except OSError as error:  # a full disk costs time in the next run, not this one
            logger.warning(
                "%s: %d reference log-probs could not be written (%s)",
                self.folder, len(finite), error,
            )  # fmt: skip

    def _read(self) -> tuple[dict[Path, Records], list[Path]]:
        """Return the files that are whole, mapped into memory, and those that are not."""
        shards: dict[Path, Records] = {}
        damaged: list[Path] = []
        seen: set[Path] = set()
        while new := sorted(set(self.folder.glob("*.logps")) - seen):
            seen.update(new)  # another process may have merged some meanwhile: look again
            for path in new:
                try:
                    shards[path] = _records(path)
                except FileNotFoundError:
                    continue
                except (OSError, ValueError) as error:
                    damaged.append(path)
                    logger.warning(
                        "%s: damaged (%s); its reference log-probs are computed again", path, error
                    )
        return shards, damaged

    def _merge(self) -> None:
        """Make one file of many; the old ones go when the new one is whole."""
        try:
            with lock(self.folder):
                shards, _ = self._read()
                every = np.concatenate(list(shards.values()))
                _, first = np.unique(every["key"], return_index=True)
                whole = _write_records(self.folder, every[first])
                for path in shards.keys() - {whole}:
                    path.unlink(missing_ok=True)
                for path in self.folder.glob(".*.logps.*"):  # of killed processes
                    if time.time() - path.stat().st_mtime > 3600:
                        path.unlink(missing_ok=True)
        except (OSError, OutputError):  # another process does it, or another run will
            return


def answer_keys(data: Tokenised) -> Keys:
    """Return what each answer is found by, ``[rows, columns]``: its tokens and its prompt's."""
    found: list[list[bytes]] = []
    for table in data.rows.with_format("arrow").iter(batch_size=1000):
        prompts = _token_arrays(table, "prompt_ids")
        answers = [_token_arrays(table, f"{name}_ids") for name in ANSWERS[data.kind]]
        for prompt, *own in zip(prompts, *answers, strict=True):
            start = hashlib.sha256(len(prompt).to_bytes(8, "little") + prompt.tobytes())
            row = []
            for answer in own:
                digest = start.copy()
                digest.update(answer.tobytes())
                row.append(digest.digest()[:16])
            found.append(row)
    return np.array(found, dtype="S16").reshape(len(data), len(ANSWERS[data.kind]))


def _token_arrays(table: Any, name: str) -> list[NDArray[np.int32]]:
    column = table.column(name).combine_chunks()
    tokens = column.flatten().to_numpy(zero_copy_only=False).astype("<i4")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def _lookup(shards: Iterable[Records], keys: Keys) -> Table:
    """Return the value of each key, NaN where no shard has it."""
    flat = keys.ravel()
    values = np.full(len(flat), np.nan)
    for records in shards:
        place = np.searchsorted(records["key"], flat).clip(max=len(records) - 1)
        hit = records["key"][place] == flat
        values[hit] = records["logp"][place[hit]]
    return values.reshape(keys.shape)


def _rows_to_run(keys: Keys, known: Table) -> list[int]:
    """Return rows that hold every unknown answer, those left out that an earlier row holds."""
    rows: list[int] = []
    planned: set[bytes] = set()
    for i in np.flatnonzero(np.isnan(known).any(axis=1)).tolist():
        unknown = set(keys[i][np.isnan(known[i])].tolist())
        if not unknown <= planned:
            rows.append(i)
            planned |= unknown
    return rows


def _records(path: Path) -> Records:
    """Map a file into memory.

    Raises:
        ValueError: its content is not what was written.
    """
    content: Any = np.memmap(path, dtype=np.uint8, mode="r")
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise ValueError("its checksum differs")
    records: Records = content.view(RECORD)
    return records


def _remove_damaged(path: Path) -> None:
    """Remove a file, unless the same content has been written whole there again."""
    try:
        _records(path)
    except (OSError, ValueError):
        path.unlink(missing_ok=True)


def _write_records(folder: Path, records: Records) -> Path:
    content = records.tobytes()
    path = folder / f"{hashlib.sha256(content).hexdigest()}.logps"
    write_bytes(path, content)
    return path
