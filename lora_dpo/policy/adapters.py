"""LoRA on the base: fresh, or from an existing adapter whose frozen copy is then the reference."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from lora_dpo.config import BASE_CHANGING_INITS, LoraConfig, ModelConfig
from lora_dpo.errors import ModelError
from lora_dpo.policy.bases import (
    default_device,
    guard_cpu_kernels,
    let_segments_grow,
    load_base,
    silence_base_dropout,
)
from lora_dpo.policy.checks import (
    CHANGED_BASE,
    refuse_layers,
    refuse_lora,
    refuse_spread,
    refuse_tied_head,
    refuse_unmatched,
)
from lora_dpo.policy.files import ADAPTER_WEIGHTS, check_adapter_files, check_adapter_settings
from lora_dpo.policy.switching import REFERENCE, policy_adapter, unwrap
from lora_dpo.sealing import check_seal

logger = logging.getLogger("lora_dpo")

ADAPTER = "default"
ADAPTER_FILE = "adapter_config.json"


def load_policy(
    base: str | Path | PreTrainedModel,
    *,
    quantisation: str = "nf4",
    lora: peft.LoraConfig | LoraConfig | None = None,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> PeftModel:
    """Load a base model and put LoRA adapters on it: the policy, whose base is the reference.

    Args:
        base: a folder, a hub id, or a loaded causal language model (then nothing is loaded).
        quantisation: ``nf4``, ``fp4``, ``int8`` or ``none``.
        lora: a ``peft.LoraConfig`` or ours; rank 16 on all linear layers if left out.
        adapter: a saved adapter to start from, or a finished run's folder. Its frozen copy becomes
            the reference.
        device: where it lives; the current accelerator, or the CPU.
        settings: further fields of ``lora_dpo.config.ModelConfig``, such as ``compute_dtype``.

    Raises:
        ModelError: a base or adapter that is not there or cannot be trained here.
    """
    if lora is not None and adapter is not None:
        raise ModelError(
            "load_policy: got both 'lora' and 'adapter'; an adapter that is started from brings its "
            "own rank, alpha and targets."
        )
    let_segments_grow()
    place = torch.device(device) if device is not None else default_device()
    if isinstance(base, PreTrainedModel):
        model = base
        guard_cpu_kernels(model)
        refuse_spread(model)
        model.requires_grad_(False)
    else:
        settings["quantisation"] = quantisation
        model = load_base(ModelConfig(base=str(base), **settings), place)
    if adapter is not None:
        return _start_from(model, Path(adapter))
    if lora is None or isinstance(lora, LoraConfig):
        lora = peft_config(lora or LoraConfig())  # type: ignore[call-arg]
    refuse_lora(lora, "lora")
    refuse_tied_head(model, lora)
    try:
        with _peft_without_its_own_warnings():
            policy = peft.get_peft_model(model, lora, adapter_name=ADAPTER)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, re.error) as error:
        said = " ".join(str(error).split())[:400]
        ours = " (target_modules is lora.targets here; lora.exclude leaves modules out)"
        raise ModelError(f"lora: {said}{ours if 'target_modules' in said else ''}") from None
    refuse_unmatched(policy, lora)
    return prepare_policy(policy)


def prepare_policy(
    policy: PeftModel, *, reference_is: Literal["auto", "base", "start"] = "auto"
) -> PeftModel:
    """Check a ``PeftModel`` and make it ready to be trained against its reference.

    Trainable weights become float32.

    Args:
        policy: its one active adapter is trained. An adapter named ``reference`` is the reference.
        reference_is: without such an adapter: ``base``, adapters disabled; ``start``, a frozen copy
            of the active adapter; ``auto``, the base for a fresh adapter and ``start`` for one that
            changes the base already (an SFT adapter).

    Raises:
        ModelError: another method than LoRA, several active adapters, an init that rewrote the
            base weights, trained biases, or nothing that is trained.
    """
    name = policy_adapter(policy)
    refuse_lora(policy.peft_config[name], f"adapter {name!r}")
    refuse_spread(policy.get_base_model())
    refuse_layers(policy, name)
    guard_cpu_kernels(policy)
    if silenced := silence_base_dropout(policy):
        logger.info("dropout of the base turned off in %d modules", len(silenced))
    start = reference_is == "start" or (reference_is == "auto" and not is_fresh(policy))
    if REFERENCE not in policy.peft_config and start:
        snapshot_reference(policy)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ModelError(
            f"adapter {name!r}: none of its weights requires gradient; load it with is_trainable=True."
        )
    return policy


def is_fresh(policy: PeftModel, name: str | None = None) -> bool:
    """Whether an adapter leaves the base as it is: every ``lora_B`` is 0, none is DoRA-moved.

    Full copies (``modules_to_save``) count as fresh when they equal the module that they replace.
    """
    name = name or policy_adapter(policy)
    module: Any
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            factors = (*module.lora_B.items(), *module.lora_embedding_B.items())
            for key, factor in factors:
                weight: Any = factor.weight if isinstance(factor, nn.Module) else factor
                if key == name and bool(weight.detach().count_nonzero()):
                    return False
        elif isinstance(module, peft.utils.ModulesToSaveWrapper) and name in module.modules_to_save:
            pairs = zip(
                module.modules_to_save[name].parameters(),
                module.original_module.parameters(),
                strict=True,
            )
            if not all(torch.equal(mine.detach().to(base.dtype), base) for mine, base in pairs):
                return False
    return True


def equals_reference(policy: nn.Module) -> bool:
    """Whether the weights of the policy are those of its reference."""
    model = unwrap(policy)
    if REFERENCE not in model.peft_config:
        return is_fresh(model)
    if is_fresh(model) and is_fresh(model, REFERENCE):
        return True  # of other ranks, perhaps
    mine, fixed = (
        peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        for name in (policy_adapter(model), REFERENCE)
    )
    return mine.keys() == fixed.keys() and all(torch.equal(mine[key], fixed[key]) for key in mine)


def snapshot_reference(policy: PeftModel) -> None:
    """Freeze a copy of the active adapter under the name ``reference``."""
    name = policy_adapter(policy)
    policy.add_adapter(REFERENCE, _copy_config(policy.peft_config[name]))
    state = peft.get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    peft.set_peft_model_state_dict(policy, state, adapter_name=REFERENCE)
    policy.set_adapter(name)
    guard_cpu_kernels(policy)
    for key, parameter in policy.named_parameters():
        if f".{REFERENCE}" in key:
            parameter.requires_grad_(False)


def save_adapter(policy: nn.Module, folder: Path, *, adapter: str | None = None) -> None:
    """Write one adapter as peft alone loads it: ``adapter_config.json`` and safetensors, flat."""
    model = unwrap(policy)
    name = adapter or policy_adapter(model)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".peft-") as work:
        model.save_pretrained(work, selected_adapters=[name], save_embedding_layers=False)
        written = Path(work) if name == "default" else Path(work) / name
        for path in sorted(written.iterdir()):
            if path.suffix in {".json", ".safetensors"}:
                shutil.move(path, folder / path.name)


def load_adapter(base: PreTrainedModel, adapter: Path, reference: Path | None) -> PeftModel:
    """Put a saved policy back on its base, with the frozen reference beside it if it has one."""
    policy = _from_pretrained(base, adapter)
    if reference is not None:
        _check_saved(reference)
        try:
            policy.load_adapter(str(reference), REFERENCE, is_trainable=False)
        except (ValueError, OSError, RuntimeError) as error:
            raise ModelError(f"{reference}: {' '.join(str(error).split())[:400]}") from None
        policy.set_adapter(ADAPTER)
    guard_cpu_kernels(policy)
    return policy


def add_adapter(policy: PeftModel, adapter: Path, name: str) -> None:
    """Load one more saved adapter beside those of a policy, frozen; the active one stays active.

    Raises:
        ModelError: there is no adapter, or it is one of another model.
    """
    _check_saved(adapter)
    active = policy_adapter(policy)
    trained = {key: p.requires_grad for key, p in policy.named_parameters()}
    try:
        with _peft_without_its_own_warnings():
            policy.load_adapter(str(adapter), name, is_trainable=False)
    except (ValueError, OSError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"{adapter}: this adapter does not fit the base model: {reason}") from None
    _refuse_other_keys(policy, adapter, name)
    policy.set_adapter(active)
    for key, parameter in policy.named_parameters():
        parameter.requires_grad_(trained.get(key, False))
    guard_cpu_kernels(policy)


def peft_config(settings: LoraConfig) -> peft.LoraConfig:
    """Translate our section ``lora`` into peft's own config."""
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft scales by any number
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        exclude_modules=settings.exclude or None,
        modules_to_save=settings.modules_to_save or None,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        bias="none",
        task_type="CAUSAL_LM",
    )


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter that is given as such, or as the folder of a finished run.

    Raises:
        ModelError: neither; where a run has not ended, what to do about it.
    """
    folder = Path(path)
    for found in (folder, folder / "adapter"):
        if (found / ADAPTER_FILE).is_file():
            return found
    unfinished = (folder / "config.yaml").is_file()
    raise ModelError(
        f"{folder}: no adapter there (adapter_config.json is missing). "
        + (
            "This run has not ended: go on with --resume, or give one of its checkpoints."
            if unfinished
            else "Give the folder that peft or lora-dpo wrote, or that of a finished run."
        )
    )


def _start_from(base: PreTrainedModel, adapter: Path) -> PeftModel:
    policy = _from_pretrained(base, adapter_folder(adapter))
    return prepare_policy(policy, reference_is="start")


def _check_saved(adapter: Path) -> dict[str, Any]:
    """Return the settings of a saved adapter, refused where they rewrote the base or a file is damaged."""
    folder = adapter_folder(adapter)
    path = folder / ADAPTER_FILE
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{path}: not readable as JSON ({error}); the adapter is damaged."
        ) from None
    check_adapter_settings(path, stored)
    check_adapter_files(folder)
    init = stored.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise ModelError(CHANGED_BASE.format(where=path, init=init))
    check_seal(folder, (ADAPTER_FILE, ADAPTER_WEIGHTS))
    return stored


def _from_pretrained(base: PreTrainedModel, adapter: Path) -> PeftModel:
    stored = _check_saved(adapter)
    try:
        with _peft_without_its_own_warnings():
            policy = PeftModel.from_pretrained(
                base, str(adapter), adapter_name=ADAPTER, is_trainable=True
            )
    except (ValueError, OSError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"{adapter}: this adapter does not fit the base model: {reason}") from None
    _refuse_other_keys(policy, adapter, ADAPTER)
    trained_on, here = stored.get("base_model_name_or_path"), base.config._name_or_path
    if trained_on and Path(trained_on).name != Path(here).name:
        logger.warning("%s: was trained on %s, and is put on %s here", adapter, trained_on, here)
    return policy


def _refuse_other_keys(policy: PeftModel, adapter: Path, name: str) -> None:
    """An adapter of a deeper or shallower model loads in part, and would be a wrong reference."""
    expected = peft.get_peft_model_state_dict(
        policy, adapter_name=name, save_embedding_layers=False
    )
    found = peft.utils.load_peft_weights(str(adapter), device="cpu")
    if different := sorted(expected.keys() ^ found.keys()):
        raise ModelError(
            f"{adapter}: this adapter is of another model: {len(different)} of its weights and the "
            f"base's layers do not meet, {different[0]} among them."
        )


@contextmanager
def _peft_without_its_own_warnings() -> Iterator[None]:
    """peft 0.21 reads a name of transformers that 5.23 deprecates; nobody here can act on that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # these two are errors of ours
        warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def _copy_config(config: Any) -> Any:
    copied = type(config)(
        **{k: v for k, v in config.to_dict().items() if k in config.__dataclass_fields__}
    )
    copied.inference_mode = True
    return copied
