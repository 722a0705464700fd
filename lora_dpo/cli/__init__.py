"""The command ``lora-dpo``: each subcommand hands on to the Python function of the same name.

Nothing heavy is imported before a subcommand runs. Exit codes: 0 done, 1 a mistake that the user
can correct (one message, no traceback), 2 wrong usage.
"""

from __future__ import annotations

# isort: off
# in the order of --help
from lora_dpo.cli import setting_up as _setting_up
from lora_dpo.cli import preferring as _preferring
from lora_dpo.cli import training as _training
from lora_dpo.cli import looking as _looking
from lora_dpo.cli import handing_on as _handing_on

# isort: on
from lora_dpo.cli.shared import app

__all__ = ["app", "main"]
_ROOMS = (_setting_up, _preferring, _training, _looking, _handing_on)


def main() -> None:
    """Run the command."""
    app()
