"""The pages of the API: every public name of the package, from its docstring."""

from __future__ import annotations

import inspect
from pathlib import Path

from objective_pages import write

import lora_dpo

# Modules by what they are for; a module that is in none of these comes last.
PAGES = {
    "runs": (
        "Runs",
        "From a config to a folder, and what is done with one afterwards.",
        ("config", "drafting", "run", "finetuning", "run_folder", "finished"),
    ),
    "looking": (
        "Looking",
        "The machine, the fit, the data, what became of the policy.",
        ("checkup", "planning", "inspecting", "evaluation", "generation", "comparing", "reporting"),
    ),
    "preferences": (
        "Rewards and own preferences",
        "The implicit reward as a product, judges, and preferences made of own samples.",
        ("scoring", "judging", "sampling", "labelling"),
    ),
    "pieces": (
        "Pieces",
        "For your own loop, model or data.",
        (
            "data",
            "policy",
            "forward",
            "stats",
            "trainer",
            "reference_cache",
            "reference_store",
            "exporting",
        ),
    ),
}
OBJECTIVES = """\
# Objectives in Python

The functions themselves have [a page each](../objectives/index.md).

```{eval-rst}
.. automodule:: lora_dpo.objectives
   :members: get, build, mixture, objective, Objective, BoundObjective, Term, Hyperparameter, Interval
   :member-order: bysource
   :no-index:

.. automodule:: lora_dpo.testing
   :members:
   :no-index:
```
"""
ERRORS = """\
# Errors

```{eval-rst}
.. automodule:: lora_dpo.errors
   :members: LoraDpoError, ConfigError, DataError, ModelError, OutputError, TrainingError, ExportError
   :show-inheritance:
```
"""


def write_api(folder: Path) -> None:
    """Write ``index.md`` and a page for each group of names."""
    folder.mkdir(exist_ok=True)
    homes = {name: lora_dpo._HOME[name].split(".")[0] for name in lora_dpo.__all__}
    placed = {module for _, _, modules in PAGES.values() for module in modules}
    left = [n for n, home in homes.items() if home not in placed | {"objectives", "errors"}]
    written = []
    for name, (title, about, modules) in PAGES.items():
        names = sorted((n for n in homes if homes[n] in modules), key=_order(homes, modules))
        write(folder / f"{name}.md", _page(title, about, names))
        written.append(name)
    if left:
        write(folder / "further.md", _page("Further", "Parts of the journey beside.", left))
        written.append("further")
    write(folder / "objectives.md", OBJECTIVES)
    write(folder / "errors.md", ERRORS)
    tree = "\n".join([*written, "objectives", "errors"])
    write(
        folder / "index.md",
        "# Python\n\nEverything that `import lora_dpo` offers, from its docstrings. Names load on "
        f"first use.\n\n```{{toctree}}\n:maxdepth: 2\n\n{tree}\n```\n",
    )


def _order(homes: dict[str, str], modules: tuple[str, ...]):
    return lambda name: (modules.index(homes[name]), name)


def _page(title: str, about: str, names: list[str]) -> str:
    parts = []
    for name in names:
        found = getattr(lora_dpo, name)
        if inspect.isclass(found):
            parts.append(
                f".. autoclass:: lora_dpo.{name}\n   :members:\n   :member-order: bysource"
            )
        elif inspect.ismodule(found):
            parts.append(f".. automodule:: {found.__name__}\n   :no-index:")
        else:
            parts.append(f".. autofunction:: lora_dpo.{name}")
    body = "\n\n".join(parts)
    return f"# {title}\n\n{about}\n\n```{{eval-rst}}\n{body}\n```\n"
