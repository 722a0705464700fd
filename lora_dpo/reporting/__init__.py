"""One page about runs, whole or not: settings, data, curves, findings, samples, plan, exports."""

from lora_dpo.reporting.reports import Report, report

__all__ = ["Report", "report"]
