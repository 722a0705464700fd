"""Handing a run on: adapters that all read alike, merged weights, GGUF, the hub, and a smoke test."""

from lora_dpo.handing.export_run import export
from lora_dpo.handing.exported import Exported
from lora_dpo.handing.gguf_files import Gguf, write_gguf
from lora_dpo.handing.pushing import Pushed, push
from lora_dpo.handing.smoke_checks import Smoke, smoke

__all__ = ["Exported", "Gguf", "Pushed", "Smoke", "export", "push", "smoke", "write_gguf"]
