"""The policy (a base in 4 bits with LoRA) and the reference (the same base without it)."""

from lora_dpo.policy.adapters import (
    ADAPTER,
    adapter_folder,
    add_adapter,
    equals_reference,
    is_fresh,
    load_adapter,
    load_policy,
    peft_config,
    prepare_policy,
    save_adapter,
    snapshot_reference,
)
from lora_dpo.policy.bases import (
    check_base,
    compute_dtype,
    default_device,
    load_base,
    stored_kind,
    without_dropout,
)
from lora_dpo.policy.facts import PolicyFacts, adapter_change, describe_policy
from lora_dpo.policy.files import (
    as_published,
    check_adapter_settings,
    check_base_files,
    check_config_files,
)
from lora_dpo.policy.identity import reference_identity
from lora_dpo.policy.moving import (
    MOVING_FILE,
    UPDATES,
    ReferenceUpdate,
    let_reference_move,
    move_reference,
    read_reference,
    write_reference,
)
from lora_dpo.policy.portable import Folded, save_portable_adapter
from lora_dpo.policy.switching import (
    REFERENCE,
    acting,
    describe_reference,
    policy_adapter,
    reference,
    shaken,
    unwrap,
)
from lora_dpo.policy.weights import Merged, dequantised, merged_tensors, plain_weight

__all__ = [
    "ADAPTER",
    "MOVING_FILE",
    "REFERENCE",
    "UPDATES",
    "Folded",
    "Merged",
    "PolicyFacts",
    "ReferenceUpdate",
    "acting",
    "adapter_change",
    "adapter_folder",
    "add_adapter",
    "as_published",
    "check_adapter_settings",
    "check_base",
    "check_base_files",
    "check_config_files",
    "compute_dtype",
    "default_device",
    "dequantised",
    "describe_policy",
    "describe_reference",
    "equals_reference",
    "is_fresh",
    "let_reference_move",
    "load_adapter",
    "load_base",
    "load_policy",
    "merged_tensors",
    "move_reference",
    "peft_config",
    "plain_weight",
    "policy_adapter",
    "prepare_policy",
    "read_reference",
    "reference",
    "reference_identity",
    "save_adapter",
    "save_portable_adapter",
    "shaken",
    "snapshot_reference",
    "stored_kind",
    "unwrap",
    "without_dropout",
    "write_reference",
]
