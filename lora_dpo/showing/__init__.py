"""Facts on a terminal and in HTML. Whatever comes from data is shown as text, never obeyed."""

from lora_dpo.showing.pages import Displayed, Told, fragment, page, script
from lora_dpo.showing.redrawing import Redrawn, bar, bars_on_terminals_only, can_redraw
from lora_dpo.showing.terminals import as_text, console_for, hanging, print_to, said
from lora_dpo.showing.visible import Lines, visible

__all__ = [
    "Displayed",
    "Lines",
    "Redrawn",
    "Told",
    "as_text",
    "bar",
    "bars_on_terminals_only",
    "can_redraw",
    "console_for",
    "fragment",
    "hanging",
    "page",
    "print_to",
    "said",
    "script",
    "visible",
]
