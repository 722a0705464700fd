"""DPO's known failures, looked for in every run: what was measured, why it matters, what to change."""

from lora_dpo.diagnostics.diagnosing import Effort, diagnose_data, diagnose_policy, read_margins
from lora_dpo.diagnostics.findings import Diagnosis, Finding

__all__ = ["Diagnosis", "Effort", "Finding", "diagnose_data", "diagnose_policy", "read_margins"]
