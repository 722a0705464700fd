"""A sample of the campaign: ``python -m tests.faults.campaign`` has the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_dpo.errors import OutputError
from lora_dpo.store import new_folder
from tests.faults import page, soak, storage
from tests.faults.campaign import Campaign
from tests.faults.checks import Whole
from tests.faults.kills import Kill, killed_run, uninterrupted
from tests.faults.world import SETTINGS, World

SAMPLE = "KTO's running baseline, stored reference, dropout"
MOMENTS = [
    "filling the store of reference log-probs",
    "writing a checkpoint",
    "the end: adapter, results",
]


@pytest.fixture(scope="module", autouse=True)
def _settings() -> None:
    SETTINGS[SAMPLE] = {
        "objective.name": "kto_running",
        "train.cache_reference": True,
        "lora.dropout": 0.1,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("faults"), seed=1)


@pytest.fixture(scope="module")
def expected(world: World) -> Whole:
    return uninterrupted(world, SAMPLE)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nobody_had(
    world: World, expected: Whole
) -> None:
    """Real processes, SIGKILL, ``--resume`` each time; the end is compared byte for byte."""
    assert list(killed_run(world, SAMPLE, expected, MOMENTS, 0))


def test_a_full_disk_is_one_error_and_costs_nothing_that_was_saved(
    world: World, expected: Whole
) -> None:
    try:
        (tried,) = storage.full_disk(world, SAMPLE, expected, shares=(0.5,))
    except storage.NotHereError as error:
        pytest.skip(str(error))
    assert tried.outcome.startswith("one error")


def test_every_writer_that_meets_a_full_disk_is_understood(tmp_path: Path) -> None:
    """safetensors and torch tell it as errors of their own."""
    tensors = {"a": torch.zeros(100_000)}
    writers: list[Callable[[Path], Any]] = [
        lambda path: save_file(tensors, path / "a.safetensors"),
        lambda path: torch.save(tensors, path / "a.pt"),
        lambda path: (path / "a.txt").write_text("a" * 400_000),
    ]
    try:
        with storage.disk(tmp_path / "small", "size=64k"):
            for write in writers:
                told = pytest.raises(OutputError, match=r"could not be written.*make room")
                with told, new_folder(tmp_path / "small" / "out") as work:
                    write(work)
                assert not list((tmp_path / "small").iterdir())
    except storage.NotHereError as error:
        pytest.skip(str(error))


def test_a_row_of_the_table_says_what_came_of_its_own_kills(world: World) -> None:
    """One run ends as it should, one does not, and one fault cannot be made on this machine."""

    def kills(fails: bool) -> Iterator[Kill]:
        yield Kill("a step", SAMPLE, 2, "stopped")
        assert not fails, "another adapter"

    campaign = Campaign(world, 2)
    for fails in (False, True):
        campaign._note(kills(fails), SAMPLE)
    campaign.tried = [storage.Tried("a full disk", "not tried: mounting is not allowed")]
    text = campaign.text(0, 60.0)
    assert "| SIGKILL: a step | 2 | 1 times the same end, byte for byte; 1 times FAILED" in text
    assert "| a full disk | 0 | not tried: mounting is not allowed |  |" in text
    assert "0 faults of storage, 1 not tried on this machine, 1 failures" in text
    assert f"| FAILED {SAMPLE}: another adapter | 1 |" in text


@pytest.mark.slow
def test_memory_and_files_of_some_hundred_steps_stay_within_their_bounds(tmp_path: Path) -> None:
    """``make soak`` has thousands, and the pace; here a leak of 60 KiB a step is seen.

    A checkpoint grows until its log holds as many lines as are ever kept, which is beyond these steps.
    """
    text, failed = soak.soak(tmp_path, 150)
    assert not [x for x in failed if not x.startswith(("CPU time", "a checkpoint"))], text


def test_a_run_whose_steps_grow_longer_is_told_from_one_whose_do_not() -> None:
    """A step that costs its number is 7/8 over 3/8; a machine that stops a while changes no median."""
    at = np.arange(0, 4001, 10)
    assert soak.slowing(np.cumsum(at / 1e6), at, 4000) == pytest.approx(7 / 3, rel=0.02)
    even = np.full(len(at), 0.1)
    even[350] = 60.0
    assert soak.slowing(np.cumsum(even), at, 4000) == pytest.approx(1.0)


def test_a_part_of_a_page_is_replaced_and_its_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    page.put(path, "x", page.table(["n"], [[1]]))
    once = path.read_text()
    assert once.startswith("a\n<!-- x -->\n") and once.endswith("<!-- end of x -->\nb\n")
    assert "| 1 |" in once and "old" not in once
    page.put(path, "x", page.table(["n"], [[1]]))
    assert path.read_text() == once
    with pytest.raises(SystemExit, match="no place for 'y'"):
        page.put(path, "y", "")
