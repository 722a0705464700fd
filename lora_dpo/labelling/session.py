"""What has been asked and answered: the state behind the page, each answer saved as it comes."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from lora_dpo.errors import OutputError
from lora_dpo.journal import Journal
from lora_dpo.labelling.items import Item, Items, text_of
from lora_dpo.labelling.result import Labels
from lora_dpo.showing import visible
from lora_dpo.store import file_sha256, write_text

CHOICES = {"pairs": ("left", "right", "tie", "skip"), "thumbs": ("up", "down", "skip")}
_JOINERS = "\n\t\u200c\u200d"  # kept: lines, and what joins letters and signs in many scripts


class Session:
    """Questions, answers and the file that they become. Safe to be called from several threads.

    Args:
        items: the questions.
        journal: where answers are kept; those in it already are taken up.
        to: the file of preferences.
        seed: decides which completion stands left.
    """

    def __init__(self, items: Items, journal: Journal, to: Path, seed: int) -> None:
        self.items, self.journal, self.to, self.seed = items, journal, to, seed
        self.over = threading.Event()  # set when whoever waits for the end may go on
        self.finished = False
        self._lock = threading.RLock()
        self._answers: dict[str, dict[str, Any]] = {}  # by item, in the order given
        self._written: set[str] = set()  # checksums of what we wrote
        for line in journal.lines:
            self._take_up(line)
        self._check_rows()
        self._check_target()

    def state(self) -> dict[str, Any]:
        """Return what the page shows: texts and counts, and nothing of where a text is from."""
        with self._lock:
            item = self._current()
            counts = Counter(answer["choice"] for answer in self._answers.values())
            return {
                "mode": self.items.mode,
                "turn": len(self.journal.lines),
                "all": len(self.items.items),
                "done": len(self._answers),
                "counts": {name: counts[name] for name in CHOICES[self.items.mode]},
                "prompt": _turns(item.prompt) if item else [],
                "texts": [_readable(text_of(c)) for c in self._in_order(item)] if item else [],
                "over": self.finished,
            }

    def choose(self, turn: Any, choice: Any) -> bool:
        """Save an answer to the question that stands; False: it is none, or another one stands."""
        with self._lock:
            item = self._current()
            legal = CHOICES[self.items.mode]
            if item is None or choice not in legal or not self._stands(turn):
                return False
            line = {"item": item.key, "row": str(item.origin), "choice": choice}
            if self.items.mode == "pairs":
                line["left"] = self._left(item)  # which of the row's completions stood there
            self._add(line)
            if self._current() is None:
                self.write()
            return True

    def undo(self, turn: Any) -> bool:
        """Take the last answer back; False: there is none, or another question stands."""
        with self._lock:
            if not self._answers or not self._stands(turn):
                return False
            self._add({"undo": next(reversed(self._answers))})
            return True

    def write(self) -> None:
        """Write the preferences that the answers make; the journal stays what they are made from."""
        with self._lock:
            rows = [row for item in self.items.items for row in self._rows(item)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if not self._written and not rows:
                return  # nothing said yet: no empty file
            checksum = hashlib.sha256(text.encode("utf-8")).hexdigest()
            if self.to.exists() and checksum == file_sha256(self.to):
                return
            # its checksum first: after a kill between the two the old file is still known as ours
            self._add({"written": checksum})
            write_text(self.to, text)

    def finish(self) -> None:
        """Write the preferences, and take no more answers."""
        with self._lock:
            self.write()
            self.finished = True

    def result(self) -> Labels:
        """Return what was answered, counted."""
        pairs, answers = self.items.mode == "pairs", self._answers
        wins: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        written = 0
        for item in self.items.items:
            choice = answers[item.key]["choice"] if item.key in answers else None
            written += choice in ("left", "right", "up", "down")
            if choice is None or choice == "skip" or not item.sources:
                continue
            asked.update(item.sources)
            if choice in ("left", "right"):
                wins[item.sources[self._chosen(item)]] += 1
            elif choice == "tie":
                wins.update(dict.fromkeys(item.sources, 0.5))
            else:
                wins.update(dict.fromkeys(item.sources, int(choice == "up")))
        return Labels(
            mode=self.items.mode,
            to=str(self.to),
            journal=str(self.journal.path),
            questions=len(self.items.items),
            choices={
                name: sum(answer["choice"] == name for answer in answers.values())
                for name in CHOICES["pairs" if pairs else "thumbs"]
            },
            written=written,
            wins={name: (float(wins[name]), asked[name]) for name in asked},
            left_out=dict(self.items.left_out),
        )

    def _stands(self, turn: Any) -> bool:
        return turn == len(self.journal.lines) and not self.finished

    def _add(self, line: dict[str, Any]) -> None:
        self.journal.add(line)
        self._take_up(line)

    def _take_up(self, line: dict[str, Any]) -> None:
        if "undo" in line:
            self._answers.pop(line["undo"], None)
        elif "written" in line:
            self._written.add(line["written"])
        elif line.get("choice") in CHOICES[self.items.mode]:
            self._answers.pop(line["item"], None)
            self._answers[line["item"]] = line
        else:
            raise OutputError(f"{self.journal.path}: holds {line}, which is no answer of ours.")

    def _check_rows(self) -> None:
        known = {item.key for item in self.items.items}
        strange = [answer for key, answer in self._answers.items() if key not in known]
        if strange:
            raise OutputError(
                f"{self.journal.path}: {len(strange)} answers are to rows that are not in the data now, "
                f"the first of them to {strange[0]['row']}. Bring the old data back (rows may be "
                "added), or choose another file with --to."
            )

    def _check_target(self) -> None:
        """Refuse to write over what is not, or no longer, what we wrote."""
        if not self.to.exists():
            return
        if not self.to.is_file() or file_sha256(self.to) not in self._written:
            raise OutputError(
                f"{self.to}: exists already, and is not as an earlier session left it. Choose another "
                "file with --to, or move this one away."
            )

    def _current(self) -> Item | None:
        return next((i for i in self.items.items if i.key not in self._answers), None)

    def _left(self, item: Item) -> int:
        """Return which completion stands left, from seed and texts alone: the same in any file."""
        first_text, second_text = map(text_of, item.completions)
        swapped = random.Random(f"{self.seed}:{item.key}").random() < 0.5
        return int((first_text > second_text) != swapped)

    def _in_order(self, item: Item) -> list[Any]:
        if len(item.completions) == 1:
            return list(item.completions)
        left = self._left(item)
        return [item.completions[left], item.completions[1 - left]]

    def _chosen(self, item: Item) -> int:
        answer = self._answers[item.key]
        left = self._left(item)
        return left if answer["choice"] == "left" else 1 - left

    def _rows(self, item: Item) -> list[dict[str, Any]]:
        choice = self._answers.get(item.key, {}).get("choice")
        if choice in ("left", "right"):
            best = self._chosen(item)
            sides = {"chosen": item.completions[best], "rejected": item.completions[1 - best]}
            return [{"prompt": item.prompt, **sides}]
        if choice in ("up", "down"):
            wanted = choice == "up"
            return [{"prompt": item.prompt, "completion": item.completions[0], "label": wanted}]
        return []


def _turns(prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "", "text": _readable(prompt)}]
    return [
        {"role": _readable(str(turn["role"])), "text": _readable(str(turn["content"]))}
        for turn in prompt
    ]


def _readable(text: str) -> str:
    """Return a text in which no hidden character acts on those around it."""
    return "".join(c if c in _JOINERS else visible(c) for c in text)
