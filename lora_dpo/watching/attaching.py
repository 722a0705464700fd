"""What a run adds to its trainer: samples, and the plan beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_dpo.config.sections import OutputConfig
from lora_dpo.data import Tokenised
from lora_dpo.metrics import peak_bytes
from lora_dpo.store import write_json
from lora_dpo.watching.samples import SamplesCallback


def add_samples(
    trainer: Any, output: OutputConfig, tokenizer: Any, held_out: Tokenised | None
) -> None:
    """Let a trainer complete fixed held-out prompts at each evaluation, where there are any."""
    if not output.samples or held_out is None:
        return
    callback = SamplesCallback(
        trainer.model,
        tokenizer,
        held_out,
        Path(output.dir) / "samples.jsonl",
        count=output.samples,
        tokens=output.sample_tokens,
        moves=bool(trainer.moves),
        doing=trainer.display.doing,
    )
    trainer.add_callback(callback)


@contextmanager
def plan_and_measurement(trainer: Any, path: Path) -> Iterator[None]:
    """Write what the planner says of a run before the block, and behind it what was measured.

    ``measured`` holds ``peak_bytes`` of the device's own allocator since the run began to load (null
    on a CPU), ``seconds_a_step`` and ``pairs_per_second`` of the last steps without evaluations, and
    ``steps`` of this process. A run that stopped has a plan alone. Where memory runs out, the plan is
    written again as it holds from then on. Of several processes the first one
    writes.
    """
    if not trainer.is_world_process_zero():
        yield
        return
    memory = trainer.memory
    write_json(path, memory.to_dict())
    memory.tell = lambda: write_json(path, memory.to_dict())
    yield
    measured = {"peak_bytes": peak_bytes(trainer.args.device), **trainer.pace.measured()}
    write_json(path, {**memory.to_dict(), "measured": measured})
