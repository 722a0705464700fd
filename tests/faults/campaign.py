"""Kill real runs and break their disks, hold that nothing is lost, and write down what came of it.

python -m tests.faults.campaign --kills 60 --seed 0 --out docs/reliability.md
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from tests.faults import page, storage
from tests.faults.checks import Whole
from tests.faults.kills import MOMENTS, Kill, killed_export, killed_run, uninterrupted
from tests.faults.storage import NotHereError, Tried
from tests.faults.world import EVERY, SETTINGS, STEPS, World

EACH = 5  # kills of one run
NOT_TRIED = "not tried"
STATES = ("nothing", "begun", "stopped", "ended")  # in which the next start finds a killed run
FIRST = next(iter(SETTINGS))


class Campaign:
    """Goes through everything, and goes on after a failure."""

    def __init__(self, world: World, kills: int) -> None:
        self.world, self.kills = world, kills
        self.whole: dict[str, Whole] = {}
        self.kept: list[Kill] = []
        # places in ``kept`` of kills whose run did not end as it should
        self.broken: set[int] = set()
        self.tried: list[Tried] = []
        self.failures: list[str] = []
        self.bar = tqdm(total=kills, unit="kill", mininterval=1)

    def of(self, name: str) -> Whole:
        """Return the uninterrupted run of some settings, made once."""
        if name not in self.whole:
            self.bar.set_postfix_str(f"uninterrupted: {name}")
            self.whole[name] = uninterrupted(self.world, name)
        return self.whole[name]

    def run(self) -> None:
        """Do all of it."""
        serial, exports = 0, max(self.kills // 6, 1)
        turns: list[str] = []
        while len(self.kept) < self.kills - exports:
            name, before = min(SETTINGS, key=turns.count), len(self.kept) + len(self.failures)
            expected = self.of(name)
            self.bar.set_postfix_str(name)
            self._note(killed_run(self.world, name, expected, self._moments(name), serial), name)
            if len(self.kept) + len(self.failures) > before:
                turns.append(name)  # else it ended before its first moment came by: its turn again
            serial += 1
            if serial > 4 * self.kills:
                raise SystemExit("kills do not hit: is something wrong with the processes?")
        run = self.of(FIRST).trial.run
        for merge, replaces in ((True, False), (False, False), (True, True), (False, True)):
            self._note(killed_export(self.world, run, merge, replaces, -(-exports // 4)), "export")
        self.bar.close()

    def storage(self) -> None:
        """Break disks and files."""
        whole = self.of(FIRST)
        stored = self.of(storage.STORED)
        faults: dict[str, Iterator[Tried]] = {
            "disk full under the run": storage.full_disk(self.world, FIRST, whole),
            "disk full under both caches": storage.full_cache_disk(self.world, stored),
            "output folder read-only": storage.read_only(self.world, FIRST, whole),
            "damaged checkpoints": storage.damaged_checkpoints(self.world, FIRST, whole),
            "damaged caches": storage.damaged_caches(self.world, stored),
            **{
                f"two runs in one output folder, {i}": storage.two_in_one_folder(
                    self.world, FIRST, whole, i
                )
                for i in range(3)
            },
            **{
                f"two processes fill one cache, {i}": storage.two_on_one_cache(
                    self.world, stored, i
                )
                for i in range(2)
            },
        }
        for what, found in tqdm(faults.items(), unit="fault"):
            try:
                self.tried += found
            except NotHereError as error:
                self.tried.append(Tried(what, f"{NOT_TRIED}: {error}"))
            except AssertionError as error:
                self._failed(what, error)

    def _note(self, kills: Iterator[Kill], what: str) -> None:
        first = len(self.kept)
        try:
            for kill in kills:
                self.kept.append(kill)
                self.bar.update()
        except AssertionError as error:  # what the kills of this run came to is not known
            self.broken |= set(range(first, len(self.kept)))
            self._failed(what, error)

    def _failed(self, what: str, error: AssertionError) -> None:
        self.failures.append(f"{what}: {error}")
        tqdm.write(f"FAILED {self.failures[-1]}", file=sys.stderr)

    def _moments(self, name: str) -> list[str]:
        """Draw moments, the rarest so far first, as many as one run is killed at."""
        seen = [kill.moment for kill in self.kept]
        possible = [
            moment
            for moment in MOMENTS
            if "store" not in moment or SETTINGS[name].get("train.cache_reference")
        ]
        self.world.random.shuffle(possible)
        return sorted(possible, key=seen.count)[:EACH]

    def text(self, seed: int, seconds: float) -> str:
        """Return what came of it, for the page."""
        kinds: dict[str, list[int]] = defaultdict(list)
        for place, kill in enumerate(self.kept):
            kinds[kill.moment].append(place)
        rows = [
            (
                f"SIGKILL: {moment}",
                len(kinds[moment]),
                self._outcome(kinds[moment]),
                _lost([self.kept[place] for place in kinds[moment]]),
            )
            for moment in [*MOMENTS, *(k for k in kinds if k not in MOMENTS)]
        ]
        outcomes: dict[tuple[str, str], int] = defaultdict(int)
        for tried in self.tried:
            outcomes[tried.fault, tried.outcome] += 1
        absent = [outcome.startswith(NOT_TRIED) for _, outcome in outcomes]
        rows += [
            (fault, 0, outcome, "") if out else (fault, n, outcome, "none")
            for ((fault, outcome), n), out in zip(outcomes.items(), absent, strict=True)
        ]
        rows += [(f"FAILED {failure.splitlines()[0]}", 1, "", "") for failure in self.failures]
        by_settings = [
            (
                name,
                sum(k.settings == name for k in self.kept),
                _lost([k for k in self.kept if k.settings == name]),
            )
            for name in SETTINGS
        ]
        return "\n\n".join(
            [
                f"`python -m tests.faults.campaign --kills {self.kills} --seed {seed}`, "
                f"{seconds / 60:.0f} minutes; {page.machine()}.",
                f"{len(self.kept)} kills: of runs of {STEPS} steps, a checkpoint every {EVERY}; of exports. "
                f"{len(self.tried) - sum(absent)} faults of storage, {sum(absent)} not tried on this machine, "
                f"{len(self.failures)} failures.",
                page.table(["fault", "times tried", "outcome", "steps lost"], rows),
                "The kills of runs, by their settings:",
                page.table(["settings", "kills", "steps lost"], by_settings),
            ]
        )

    def _outcome(self, places: list[int]) -> str:
        """Return what kills of one moment came to, of each what its own run's checks say."""
        ends: dict[str, int] = defaultdict(int)
        for place in places:
            found = self.kept[place].found
            end = "the same end, byte for byte" if found in STATES else f"{found}; then whole"
            ends["FAILED, see below" if place in self.broken else end] += 1
        if len(ends) == 1:
            return next(iter(ends))
        return "; ".join(f"{count} times {end}" for end, count in ends.items())


def _lost(kills: list[Kill]) -> str:
    if not kills:
        return ""
    lost = [kill.lost for kill in kills]
    if not any(lost):
        return "none"
    return f"at most {max(lost)}, {sum(lost) / len(lost):.1f} in the mean"


def main(words: list[str] | None = None) -> int:
    """Run the campaign; exit with 1 where something did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="of runs and exports (60)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and delays (0)")
    parser.add_argument("--out", type=Path, help="the page whose table is written")
    parser.add_argument("--work", type=Path, help="a new folder for the runs, which are kept there")
    parser.add_argument("--no-storage", action="store_true", help="kills alone")
    args = parser.parse_args(words)
    began = time.monotonic()
    folder = args.work or Path(tempfile.mkdtemp(prefix="lora-dpo-faults-"))
    campaign = Campaign(World.make(folder, args.seed), args.kills)
    campaign.run()
    if not args.no_storage:
        campaign.storage()
    text = campaign.text(args.seed, time.monotonic() - began)
    if args.out:
        page.put(args.out, "campaign", text)
    print(text)
    if campaign.failures:
        print(f"\n{len(campaign.failures)} did not hold; the runs are in {folder}", file=sys.stderr)
        return 1
    if not args.work:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
