"""A plan from a config, before any weight is loaded, or from a policy that is about to be trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from lora_dpo.arguments import build_arguments
from lora_dpo.config import Config
from lora_dpo.engine import is_flat, obstacle, other_layers
from lora_dpo.errors import LoraDpoError, ModelError
from lora_dpo.guards import check_context
from lora_dpo.heads import base_dtype, causal_lm, home_device
from lora_dpo.layers import take, work_of
from lora_dpo.planning.cards import GIB, RESERVED, Card, card_of, this_card
from lora_dpo.planning.imagined import imagined_policy, imagining, of_depth
from lora_dpo.planning.lengths import compact_rows
from lora_dpo.planning.measuring import Setting
from lora_dpo.planning.plans import Plan, make_plan
from lora_dpo.policy import (
    REFERENCE,
    adapter_folder,
    check_adapter_settings,
    check_base,
    compute_dtype,
    peft_config,
    policy_adapter,
    stored_kind,
    unwrap,
    without_dropout,
)
from lora_dpo.positions import check_positions
from lora_dpo.preparing import load_tokenizer, prepare_data
from lora_dpo.ranks import processes
from lora_dpo.run_folder import bound_objective
from lora_dpo.sharding import check_sharding, is_sharded
from lora_dpo.stepping import Batches, batches_of, fitted, recomputes, row_length

# Adapters beside the trained one, in its size; a soft update needs twice the rank.
_BESIDE = {"hard": 1.0, "factors": 1.0, "soft": 2.0}
# Bytes of state for each trained weight, by what stands in the optimiser's name.
_STATES = (("paged", 0.0), ("8bit", 2.0), ("adafactor", 0.1), ("sgd", 4.0), ("lion", 4.0))


@dataclass(frozen=True)
class Question:
    """What a plan is asked about: a model, rows, how they become steps, and the room for it all."""

    base: str
    setting: Setting
    rows: Sequence[Mapping[str, Any]]
    batches: Batches
    room: int | None
    room_is: str
    recompute: bool
    card: Card | None
    engine: str = ""
    offloads: bool = True

    def answer(self, *, remedies: bool = True) -> Plan:
        """Return the plan.

        Args:
            remedies: whether to look for them where it does not fit.

        Raises:
            ModelError: a model whose step cannot be run without its weights.
        """
        options: Any = {"room": self.room, "room_is": self.room_is, "recompute": self.recompute}
        options |= {"card": self.card, "remedies": remedies, "engine": self.engine}
        options["offloads"] = self.offloads
        with _imagined(self.base):
            return make_plan(self.setting, self.rows, self.batches, **options)


def plan(
    config: Config | Mapping[str, Any] | str | Path, *, gpu: str | None = None, cards: int = 1
) -> Plan:
    """Say whether a run fits a card, from its config, the tokenizer and the data alone.

    Args:
        config: a ``Config``, a nested mapping, or the path of a YAML file.
        gpu: a known card or an amount of memory, as ``rtx4090`` or ``12GiB``; the card of this
            machine if left out, and no limit where there is none.
        cards: such cards; the base is dealt out among them with ``train.shard_base``, and else whole
            on each.

    Raises:
        LoraDpoError: a setting, file or model that cannot be used.
    """
    if not isinstance(config, Config):
        config = Config.load(config) if isinstance(config, (str, Path)) else Config.parse(config)
    if gpu:
        card_of(gpu)  # a slip is told before data are read
    check_sharding(config, cards)
    check_context(config, check_base(config.model))
    objective = bound_objective(config)
    data = prepare_data(config, load_tokenizer(config), objective.data)
    rows, _ = fitted(objective, data.train, None)
    return question_of(config, compact_rows(rows.rows), gpu=gpu, cards=cards).answer()


def question_of(
    config: Config, rows: Sequence[Mapping[str, Any]], *, gpu: str | None = None, cards: int = 1
) -> Question:
    """Return what a plan of a config is asked about, with rows that are tokenised already."""
    card = card_of(gpu) if gpu else this_card()
    architecture = without_dropout(check_base(config.model))  # as it is loaded
    objective = bound_objective(config)
    arguments = build_arguments(config.train.further, output_dir=config.output.dir, evaluates=False)
    adapter = config.model.adapter
    stored = getattr(architecture, "quantization_config", None)
    if config.model.attention != "auto":
        architecture._attn_implementation = config.model.attention
    lora: Any = _stored_lora(adapter) if adapter else peft_config(config.lora)
    setting = Setting(
        architecture,
        lora,
        dtype=_dtype(config.model.compute_dtype, card, given=gpu is not None),
        quantisation=stored_kind(stored) if stored else config.model.quantisation,
        double=_double(stored) if stored else config.model.double_quantisation,
        with_reference=objective.reference and not config.train.cache_reference,
        chunk=config.train.chunk_tokens,
        optimiser=optimiser_bytes(arguments),
        embeddings_on_cpu=config.model.embeddings_on_cpu,
        beside=_BESIDE.get(config.train.reference_update, float(adapter is not None)),
        shards=cards if config.train.shard_base else 1,
    )
    setting = replace(setting, grouped=_has_flash(card, setting.dtype))
    _refuse_what_depth_changes(lora)
    budget = config.train.memory_budget_gib
    room, words = (card.room, card.name) if card else (None, "")
    if budget is not None:
        room, words = int(budget * GIB), "train.memory_budget_gib"
    batches = batches_of(arguments, config.train.max_tokens_per_batch)
    with _imagined(config.model.base):
        longest = max(map(row_length, rows))
        check_positions(architecture, longest)
        setting, engine = _as_the_engine_would(setting, config.train.engine, longest)
    recompute = recomputes(arguments)
    asked = (config.model.base, setting, rows, batches, room, words, recompute, card, engine)
    return Question(*asked, offloads=config.train.activation_offloading)


@contextmanager
def _imagined(base: str) -> Iterator[None]:
    try:
        yield
    except LoraDpoError:
        raise
    except Exception as error:  # whatever a library says to tensors without values
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"plan: a step of {base!r} with these settings cannot be run without weights "
            f"({type(error).__name__}: {reason}). Training may work all the same."
        ) from None


def _refuse_what_depth_changes(lora: Any) -> None:
    named = isinstance(lora.target_modules, str) and re.search(r"\d", lora.target_modules)
    if named or getattr(lora, "layers_to_transform", None) is not None:
        raise ModelError(
            "plan: LoRA on some of the layers alone is not planned, for all layers are taken to be "
            "alike; name targets without the numbers of layers."
        )


def _double(stored: Any) -> bool:
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return bool(values.get("bnb_4bit_use_double_quant", False))


def plan_policy(
    policy: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    batches: Batches,
    *,
    args: Any,
    chunk: int,
    with_reference: bool,
    recompute: bool,
    budget_gib: float | None = None,
    brief: bool = False,
    offloads: bool = True,
) -> Plan | None:
    """Plan the training of a policy as it stands.

    Args:
        policy: with its engine chosen; what its layers do already to spare memory they will go on with.
        rows, batches: of training.
        args: ``TrainingArguments``, which say how large the optimiser's state is.
        chunk, with_reference: as in ``Setting``.
        recompute: whether layers may be recomputed.
        budget_gib: memory that training may take; that of the card if left out.
        brief: plan as well where nothing limits the memory, in half of the time.
        offloads: whether anything may wait in the memory of the CPU.

    Returns:
        The plan; None where nothing limits the memory, unless ``brief``.
    """
    device = home_device(policy)
    card = this_card(device)
    room: int | None = None
    words = ""
    if budget_gib is not None:
        room, words = int(budget_gib * GIB), "train.memory_budget_gib"
    elif card is not None:
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        room, words = int(free - RESERVED / 2), card.name
    elif not brief:
        return None
    setting = setting_of(policy, args=args, chunk=chunk, with_reference=with_reference)
    options: dict[str, Any] = {"recompute": recompute, "card": card, "brief": brief}
    options["offloads"] = offloads
    return make_plan(setting, rows, batches, room=room, room_is=words, **options)


def setting_of(policy: nn.Module, *, args: Any, chunk: int, with_reference: bool) -> Setting:
    """Return what decides the bytes of a policy's step, as it stands; see ``plan_policy``."""
    device = home_device(policy)
    model, causal = unwrap(policy), causal_lm(policy)
    work = work_of(causal)
    stored = getattr(causal.config, "quantization_config", None)
    kinds = {type(module).__name__ for module in model.modules()}
    kind = "nf4" if "Linear4bit" in kinds else "int8" if "Linear8bitLt" in kinds else "none"
    embeddings = causal.get_input_embeddings()
    place = getattr(embeddings, "original_module", embeddings).weight.device
    lora: Any = model.peft_config[policy_adapter(model)]
    _refuse_what_depth_changes(lora)
    return Setting(
        causal.config,
        lora,
        dtype=base_dtype(policy),
        quantisation=kind,
        double=bool(getattr(stored, "bnb_4bit_use_double_quant", True)),
        flat=is_flat(policy),
        fast=work is not None,
        skips_last=work is not None and work.skips_last,
        keeps_weights=work is None or work.keeps_weights,
        with_reference=with_reference,
        chunk=chunk,
        optimiser=optimiser_bytes(args),
        embeddings_on_cpu=place.type != device.type,
        beside=getattr(model.peft_config.get(REFERENCE), "r", 0) / lora.r,
        shards=processes() if is_sharded(policy) else 1,
        grouped=_has_flash(this_card(device), base_dtype(policy)),
    )


def _has_flash(card: Card | None, dtype: torch.dtype) -> bool:
    """Whether attention of these numbers runs in a flash kernel; all of them do on the CPU."""
    return card is None or (card.bfloat16 and dtype != torch.float32)


def optimiser_bytes(args: Any) -> float:
    """Return the bytes of an optimiser's state for each trained weight."""
    name = str(getattr(args.optim, "value", args.optim)).lower()
    return next((size for part, size in _STATES if part in name), 8.0)


def _as_the_engine_would(setting: Setting, engine: str, longest: int) -> tuple[Setting, str]:
    """Say what ``choose_engine`` would take, as far as that is known without weights, and why."""
    if engine == "plain":
        return replace(setting, flat=False, fast=False), "train.engine: plain"
    with imagining():
        policy = imagined_policy(
            of_depth(setting.architecture, 1),
            setting.lora,
            dtype=setting.dtype,
            quantisation=setting.quantisation,
            double=setting.double,
        )
        # of one layer, and what the others are
        reason = obstacle(policy, longest) or other_layers(setting.architecture.get_text_config())
        # a norm behind the MLP reads what it returns
        read = any("post_feedforward" in name for name, _ in policy.named_modules())
        taken = take(policy)
    whys = [f"no flat rows: {reason}"] if reason else []
    whys += [f"not {', '.join(taken.obstacles)}"] if taken.obstacles else []
    why = "; ".join([*whys, "from the config alone: training proves it at its start"])
    return replace(setting, flat=not reason, fast=bool(taken), skips_last=not read), why


def _dtype(asked: str, card: Card | None, *, given: bool) -> torch.dtype:
    if asked == "auto" and given and card is not None:
        return torch.bfloat16 if card.bfloat16 else torch.float16
    return compute_dtype(asked)


def _stored_lora(adapter: str) -> Any:
    try:
        folder = adapter_folder(adapter)
        found = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.adapter {adapter!r}: no adapter's config could be read ({error})."
        ) from None
    check_adapter_settings(folder / "adapter_config.json", found.to_dict())
    return found
