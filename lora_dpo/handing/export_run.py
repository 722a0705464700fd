"""``export``: a run handed on, as an adapter or merged, with all that others need beside the weights."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_token
from transformers import AutoConfig

from lora_dpo.card import base_licence, hub_id, model_card, public_name
from lora_dpo.data import Tokenised
from lora_dpo.errors import ConfigError, ExportError, OutputError
from lora_dpo.exporting import check_source, export_adapter, export_merged
from lora_dpo.guards import check_target
from lora_dpo.handing.consumers import consumers
from lora_dpo.handing.exported import Exported
from lora_dpo.handing.gguf_files import Gguf, check_gguf, write_gguf
from lora_dpo.handing.modelfile import modelfile
from lora_dpo.handing.pushing import check_repo_id, push
from lora_dpo.handing.reloading import reload_in_a_fresh_process
from lora_dpo.handing.serving import BASE_FOLDER, serve_adapter, serve_merged
from lora_dpo.lines import add_lines
from lora_dpo.policy import Folded
from lora_dpo.proving import Proof
from lora_dpo.run_folder import Run
from lora_dpo.smoking import SMOKE_FILE
from lora_dpo.store import read_json, write_text

logger = logging.getLogger("lora_dpo")

Base = Literal["trained", "original"]


def export(
    run: Run | str | Path,
    to: str | Path,
    *,
    merge: bool = False,
    base: Base = "trained",
    checkpoint: str = "final",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    overwrite: bool = False,
    measure_both: bool = False,
    gguf: str | None = None,
    llama_cpp: str | Path | None = None,
    base_id: str | None = None,
    push_to: str | None = None,
    private: bool = False,
) -> Exported:
    """Hand a run on: its adapter alone, or merged into plain weights and proven.

    Args:
        run: a run or its folder.
        to: the new folder; an existing one is replaced only with ``overwrite``.
        merge: whether the adapter is merged.
        base: ``trained`` (the dequantised weights that the policy was trained on) or ``original``.
        checkpoint: ``final``, ``best`` or a step.
        dtype: of the files; ``auto`` is that of the base checkpoint, and float32 for an adapter.
        overwrite: replace an existing folder, once the new one is whole.
        measure_both: merge into the other base too, measure it, and keep the one that was asked for.
        gguf: write a GGUF file of this kind too, as ``q8_0``.
        llama_cpp: a checkout of llama.cpp that writes it.
        base_id: hub id of the base, where the run names a folder.
        push_to: ``owner/name`` on the hub, to send the folder to.
        private: whether a new repository there is private.

    Returns:
        Where it lies, its proof, and what other programs make of it.

    Raises:
        ConfigError: options that do not go together.
        OutputError: a folder that is in the way, or a hub that cannot be reached.
        ExportError: a model that is not the policy; nothing is kept then.
    """
    run, target = run if isinstance(run, Run) else Run.open(run), Path(to)
    check_target(run.folder, target, overwrite=overwrite)
    if not merge and (base != "trained" or measure_both or gguf or llama_cpp):
        raise ExportError(
            "export: 'base', 'measure_both' and 'gguf' belong to a merge; give --merge with them."
        )
    _check_hub(base_id, push_to, private)
    order = _Order(
        run, target, checkpoint, dtype, overwrite, base_id or hub_id(run.config.model.base)
    )
    if merge:
        _check_gguf(order, gguf, llama_cpp)
        other: Base = "original" if base == "trained" else "trained"
        for which in (base, other) if measure_both else (base,):
            check_source(run.config.model.base, order.revision, which)
        others: dict[str, Proof] = {other: order.measured(other)} if measure_both else {}
        found = replace(order.merged(base, gguf, llama_cpp), others=others)
    else:
        found = order.adapter()
    found = replace(found, checkpoint=order.step or "final")
    try:
        if push_to:  # a repository that holds something is not replaced by the way
            found = replace(found, pushed=push(target, push_to, private=private))
    finally:  # the folder is there in any case
        add_lines(run.folder / "exports.jsonl", [found.to_dict()])
    return found


class _Order:
    """What was asked for: the same for an adapter, a merge, and a merge that is only measured."""

    def __init__(
        self,
        run: Run,
        target: Path,
        checkpoint: str,
        dtype: str,
        overwrite: bool,
        base_id: str | None,
    ) -> None:
        self.run, self.target, self.checkpoint = run, target, checkpoint
        self.dtype = None if dtype == "auto" else getattr(torch, dtype)
        self.overwrite, self.base_id = overwrite, base_id
        self.step = None if checkpoint == "final" else run.adapter_folder(checkpoint).name
        self.tokenizer = run.tokenizer()
        self.revision = run.config.model.revision
        self.chat = run.is_chat and bool(self.tokenizer.chat_template)
        self.licence = base_licence(run.config.model.base, self.revision)

    def adapter(self) -> Exported:
        """Write the adapter alone."""

        def card(folded: Folded) -> str:
            notes = [str(consumer) for consumer in consumers(folded)]
            if self.base_id is None:
                name = public_name(self.run.config.model.base)
                notes.insert(
                    0, f"the base ({name}) has no name on the hub here: load it from its folder"
                )
            return self._card(adapter=folded, notes=notes)

        def beside(work: Path, folded: Folded) -> None:
            guide = serve_adapter(folded, chat=self.chat, base_id=self.base_id)
            write_text(work / "SERVE.md", guide)
            self._write_modelfile(work, source=self.base_id or BASE_FOLDER, adapter=True)

        folded = export_adapter(
            self.run.load_policy(self.checkpoint),
            self.tokenizer,
            self.target,
            card=card,
            overwrite=self.overwrite,
            dtype=self.dtype or torch.float32,
            base_id=self.base_id,
            revision=self.revision,
            template_arguments=self.run.config.data.template_arguments,
            chat=self.chat,
            beside=beside,
        )
        return Exported(
            self.target, "adapter", None, folded.dtype, adapter=folded, consumers=consumers(folded)
        )

    def merged(self, base: Base, gguf: str | None, llama_cpp: str | Path | None) -> Exported:
        """Write merged weights, and let a process that knows nothing of this one load them."""
        made: list[Gguf] = []
        reloaded: list[str] = []

        def beside(work: Path, proof: Proof) -> None:
            if gguf:
                made.append(self._gguf(work, gguf, llama_cpp))
            file = made[0].file if made else None
            write_text(work / "SERVE.md", serve_merged(chat=self.chat, gguf=file))
            self._write_modelfile(work, source=f"./{file}" if file else ".")
            reloaded.append(reload_in_a_fresh_process(work, gated=proof.gate is not None))

        proof = self._merge(base, self.target, beside=beside, overwrite=self.overwrite)
        kind = str(read_json(self.target / "export_proof.json")["dtype"]).removeprefix("torch.")
        return Exported(
            self.target, "merged", base, kind, proof=proof, reloaded=reloaded[0],
            gguf=made[0] if made else None,
        )  # fmt: skip

    def measured(self, base: Base) -> Proof:
        """Merge into the other base weights, for the figures alone."""
        self.target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=self.target.absolute().parent, prefix=f".{self.target.name}.measured-"
        ) as work:
            return self._merge(base, Path(work) / "merged", beside=None, overwrite=False)

    def _merge(self, base: Base, to: Path, *, beside: Any, overwrite: bool) -> Proof:
        return export_merged(
            lambda: self.run.load_policy(self.checkpoint),
            self.tokenizer,
            to,
            sequences=_proof_sequences(self.run.proof_rows()),
            base=base,
            dtype=self.dtype,
            revision=self.revision,
            card=lambda proof: self._card(
                proof=proof, notes=["SERVE.md has the commands that serve it"]
            ),
            overwrite=overwrite,
            template_arguments=self.run.config.data.template_arguments,
            chat=self.chat,
            beside=beside,
        )

    def _card(self, **facts: Any) -> str:
        return model_card(
            self.run.config,
            self.run.results,
            base_id=self.base_id,
            licence=self.licence,
            checkpoint=self.step,
            **facts,
        )

    def _gguf(self, work: Path, kind: str, llama_cpp: str | Path | None) -> Gguf:
        arguments = self.run.config.data.template_arguments
        return write_gguf(work, kind, llama_cpp=llama_cpp, template_arguments=arguments)

    def _write_modelfile(self, work: Path, *, source: str, adapter: bool = False) -> None:
        text = modelfile(
            self.tokenizer,
            read_json(work / SMOKE_FILE)["stop_ids"],
            source=source,
            adapter=adapter,
            template_arguments=self.run.config.data.template_arguments,
            chat=self.chat,
        )
        write_text(work / "Modelfile", text)


def _check_gguf(order: _Order, kind: str | None, llama_cpp: str | Path | None) -> None:
    if kind:
        base = order.run.config.model.base
        settings = AutoConfig.from_pretrained(
            base, revision=order.revision, trust_remote_code=False
        )
        check_gguf(kind, llama_cpp, settings, order.tokenizer)
    elif llama_cpp:
        raise ConfigError("export: --llama-cpp writes GGUF; say which, as --gguf q8_0.")


def _check_hub(base_id: str | None, push_to: str | None, private: bool) -> None:
    if base_id is not None:
        check_repo_id(base_id)
    if push_to is None:
        if private:
            raise ConfigError("export: --private belongs to --push.")
        return
    check_repo_id(push_to)
    if get_token() is None:
        raise OutputError(
            "push: no token for the hub; set HF_TOKEN, or log in with 'hf auth login'. Nothing was done."
        )


def _proof_sequences(rows: Tokenised) -> list[tuple[list[int], list[int]]]:
    """Return held-out rows for the proof of a merge, short ones first, one a prompt."""
    answer = "chosen_ids" if rows.kind == "paired" else "completion_ids"
    by_prompt = {row["prompt_key"]: (row["prompt_ids"], row[answer]) for row in rows.rows}
    return sorted(by_prompt.values(), key=lambda pair: len(pair[0]) + len(pair[1]))[:64]
