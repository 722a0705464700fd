"""The folder of a run, opened again: config, results, held-out rows, policy, states.

RUN/
  config.yaml        the resolved config; reproduces the run
  environment.json   versions, hardware, git, fingerprints of base and data; a line a start
  run.json           versions, what the reference was, results
  data.json          what was dropped, truncated or repaired, with examples
  lengths.json       rows that were trained on and held out: sha256, lengths in tokens
  metrics.jsonl      every log line
  notes.jsonl        what the diagnostics noted while it ran
  samples.jsonl      what policy and reference made of fixed held-out prompts at each evaluation
  plan.json          what the planner said at the start, and what was measured
  row_margins.jsonl  the reward margin of every pair as training saw it
  adapter/           the trained policy, as peft loads it, with tokenizer
  reference/         the frozen starting adapter, if there was one
  checkpoint-N/      to resume from; the best one on held-out rows is never deleted
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_dpo import objectives
from lora_dpo.checkpoints import STATE, list_checkpoints
from lora_dpo.checkup import installed_version
from lora_dpo.config import Config
from lora_dpo.data import Tokenised
from lora_dpo.errors import DataError, OutputError
from lora_dpo.lines import whole_lines
from lora_dpo.moving_reference import ReferenceMoves
from lora_dpo.objectives import BoundObjective
from lora_dpo.policy import (
    MOVING_FILE,
    let_reference_move,
    load_adapter,
    load_base,
    read_reference,
)
from lora_dpo.preparing import load_tokenizer, prepare_data
from lora_dpo.stepping import fitted
from lora_dpo.store import read_json, read_manifest


@dataclass(frozen=True, repr=False)
class Run:
    """A finished (or saved) run: ``Run.open(folder)``, or what ``train`` returns."""

    folder: Path
    config: Config
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open the folder of a run that has trained.

        Raises:
            OutputError: the folder holds no run of ours.
        """
        path = Path(folder)
        if not (path / "config.yaml").is_file():
            raise OutputError(
                f"{path}: no run there (config.yaml is missing). Give the folder that "
                "'lora-dpo train' wrote, its output.dir."
            )
        results = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        return cls(path, Config.load(path / "config.yaml"), results)

    def __repr__(self) -> str:
        steps = f", {self.results['steps']} steps" if "steps" in self.results else ", not finished"
        held_out = self.results.get("held_out", {}).get("mean_low_high", {})
        accuracy = held_out.get("rewards/accuracies")
        told = f", held-out accuracy {accuracy[0]:.3f}" if accuracy else ""
        return f"Run({str(self.folder)!r}: {self.config.objective.name}{steps}{told})"

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every whole log line, oldest first."""
        return [entry for _, entry in whole_lines(self.folder / "metrics.jsonl")]

    @property
    def objective(self) -> BoundObjective:
        """The objective with its hyperparameters, class weights among them."""
        bound, labels = bound_objective(self.config), self.results.get("labels")
        return bound.balanced(*labels) if labels else bound

    @property
    def is_chat(self) -> bool:
        """Whether the run trains on chats; of one that did not end, the rows that it reads tell."""
        if "chat" in self.results:
            return bool(self.results["chat"])
        try:
            return prepare_data(self.config, self.tokenizer(), self.objective.data).is_chat
        except DataError:  # a base alone, or data that are gone: texts stay texts
            return False

    def objective_states(self, checkpoint: str = "final") -> dict[str, Any]:
        """Return what the objective remembered; empty for most."""
        if checkpoint == "final":
            return dict(self.results.get("objective_states", {}))
        return dict(read_json(self.adapter_folder(checkpoint) / STATE)["objective"])

    def tokenizer(self) -> Any:
        """Return the run's tokenizer."""
        return load_tokenizer(self.config)

    def load_policy(self, checkpoint: str = "final") -> Any:
        """Load base, trained adapter and reference.

        Args:
            checkpoint: ``final``, ``best``, or the step of a checkpoint.
        """
        adapter = self.adapter_folder(checkpoint)
        start = self.folder / "reference"
        base, moves = load_base(self.config.model), reference_moves(self.config)
        if not (moves and (adapter / MOVING_FILE).is_file()):
            return load_adapter(base, adapter, start if start.is_dir() else None)
        policy = load_adapter(base, adapter, None)
        let_reference_move(policy, moves.update)
        read_reference(policy, adapter)
        return policy

    def held_out(self) -> Tokenised:
        """Return the run's held-out rows, tokenised and fitted to the objective as in training."""
        data = prepare_data(self.config, self.tokenizer(), self.objective.data)
        _, held_out = fitted(self.objective, data.train, data.held_out)
        if held_out is None:
            raise DataError(f"{self.folder}: the run has no held-out rows; give some with --data.")
        if self.results.get("held_out_rows") not in (None, held_out.fingerprint):
            raise DataError(
                f"{self.folder}: the data has changed since the run, so its held-out rows may be ones "
                "that it was trained on. Bring the old files back, or give held-out rows with --data."
            )
        return held_out

    def proof_rows(self) -> Tokenised:
        """Return rows to compare an export on: held-out ones, else what the files hold now."""
        data = prepare_data(self.config, self.tokenizer(), self.objective.data)
        return data.held_out if data.held_out is not None else data.train

    def adapter_folder(self, checkpoint: str = "final") -> Path:
        """Return where the adapter of ``final``, ``best`` or a step is kept.

        Raises:
            OutputError: there is none.
        """
        if checkpoint == "final":
            folder = self.folder / "adapter"
        elif checkpoint == "best":
            best = self.results.get("best_checkpoint")
            if not best:
                raise OutputError(f"{self.folder}: no best checkpoint is recorded; use 'final'.")
            folder = self.folder / _name(best)
        else:
            folder = self.folder / _name(f"checkpoint-{checkpoint.removeprefix('checkpoint-')}")
        if not (folder / "adapter_config.json").is_file():
            found = [path.name for path in list_checkpoints(self.folder)]
            raise OutputError(
                f"{folder}: no adapter there. The run has {', '.join(found) or 'no checkpoints'}"
                f"{' and adapter/' if (self.folder / 'adapter').is_dir() else ' (training did not end)'}."
            )
        if checkpoint != "final":
            read_manifest(folder)  # whole, or it is not taken
        return folder


def _name(checkpoint: str) -> str:
    """Return the name of a checkpoint; a path that leads elsewhere is none."""
    if not re.fullmatch(r"checkpoint-[0-9]+", checkpoint):
        raise OutputError(
            f"checkpoint {checkpoint!r}: expected final, best, or the step of a checkpoint, as 100."
        )
    return checkpoint


def bound_objective(config: Config) -> BoundObjective:
    """Return the objective of a config, with its hyperparameters."""
    return objectives.build(config.objective.to_dict())


def reference_moves(config: Config) -> ReferenceMoves:
    """Return when the reference of a run follows the policy."""
    train = config.train
    return ReferenceMoves(
        train.reference_update, train.reference_update_steps, train.reference_update_weight
    )


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version(), "device": _device_name()}
    for name in (
        "lora-dpo",
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "datasets",
    ):
        found[name] = installed_version(name) or "not installed as a package"
    found["torch"] = torch.__version__  # with its build, which the package's version may lack
    return found


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
