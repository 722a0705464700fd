"""What is wrong with a config, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lora_dpo.config.foreign import answer_to_loss, answer_to_option
from lora_dpo.config.plain import given as told
from lora_dpo.config.sections import LoraConfig, Section, TrainConfig
from lora_dpo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from lora_dpo.config.whole import Config

_REQUIRED = {"model": "model.base", "data": "data.train", "output": "output.dir"}


def sentences(error: ValidationError, whole: type[Section]) -> Iterator[str]:
    """Yield a sentence for each thing that pydantic found, with the legal keys of its section."""
    for problem in error.errors():
        place = [str(part) for part in problem["loc"] if not str(part).startswith("list[")]
        if problem["loc"][-1] == "str" and problem["type"] == "string_type":
            place.pop()  # pydantic's name for one arm of a union
        where, given = ".".join(place), problem["input"]
        if problem["type"] == "extra_forbidden":
            yield f"{where}: {_unknown(place, whole)}{_losses(place[-1], given)}"
        elif problem["type"] == "missing":
            where = _REQUIRED.get(where, where)
            yield f"{where}: missing; it is required. Add it to the YAML, or give --set {where}=..."
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{where}: got {told(given)}; {message[0].lower()}{message[1:]}."


def problems_between(config: Config | None, values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with sections that others own, and between sections.

    Args:
        config: the sections that pydantic has checked, or None where it refused them.
        values: what the user gave.
    """
    return [
        *_objective_problems(values.get("objective", {})),
        *_moving_problems(config),
        *_cache_problems(config),
        *_objective_has_none_of(config),
        *_train_problems(values.get("train", {})),
        *_adapter_problems(config),
        *_path_problems(config),
    ]


def _unknown(place: Sequence[str], whole: type[Section]) -> str:
    """Return what a key should have been: another tool's, of another section, or the nearest."""
    if answer := answer_to_option(".".join(place)):
        return f"{answer}."
    legal = _legal_keys(place[:-1], whole)
    if len(place) == 1 and (answer := _of_a_section(place[0], whole)):
        return answer
    return f"unknown key; expected one of {', '.join(legal)}.{nearest(place[-1], legal)}"


def _losses(key: str, given: Any) -> str:
    """Return which objectives other tools' losses are, where a key names some."""
    if key not in ("loss_type", "rl", "pref_loss"):
        return ""
    names = given if isinstance(given, list) else [given]
    answers = ((name, answer_to_loss(name)) for name in names)
    return "".join(f" {name} is {answer}." for name, answer in answers if answer)


def _of_a_section(key: str, whole: type[Section]) -> str | None:
    """Return where a key belongs that stands beside the sections, as other tools have it."""
    from lora_dpo.arguments import REFUSED, argument_fields

    if key in REFUSED:
        return f"not a setting here; {REFUSED[key]}."
    homes = [name for name in whole.model_fields if key in _legal_keys([name], whole)]
    homes += ["train"] * (key in argument_fields())
    return f"belongs into a section; here it is {homes[0]}.{key}." if homes else None


def _legal_keys(path: Sequence[str], whole: type[Section]) -> list[str]:
    model: Any = whole
    for name in path:
        if name.isdigit():
            continue
        annotation = model.model_fields[name].annotation
        nested = [a for a in (annotation, *_arguments(annotation)) if _is_section(a)]
        model = nested[0] if nested else model
    return list(model.model_fields)


def _arguments(annotation: Any) -> Iterator[Any]:
    for argument in getattr(annotation, "__args__", ()):
        yield argument
        yield from _arguments(argument)


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Section)


def _objective_problems(values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return []  # pydantic has said so
    from lora_dpo import objectives

    wrong = [key for key in values if not isinstance(key, str)]
    if wrong:
        return [f"objective: the key {wrong[0]!r} is no text; expected the name of a setting."]
    try:
        objectives.build(values)
    except ConfigError as error:
        return [_answered(problem, values) for problem in error.problems]
    return []


def _answered(problem: str, values: Mapping[str, Any]) -> str:
    """Return a problem of the objective, answered where it is another tool's word for one of ours."""
    where = problem.partition(":")[0]
    if where == "objective.name":
        answer = answer_to_loss(values.get("name"))
        return f"{where}: {values['name']} is {answer}." if answer else problem
    answer = answer_to_option(where) if "no such hyperparameter" in problem else None
    return f"{where}: {answer}." if answer else problem


def _moving_problems(config: Config | None) -> list[str]:
    """Settings of a moving reference where none moves, or where there is none."""
    if config is None:
        return []
    train, defaults = config.train, TrainConfig()  # type: ignore[call-arg]
    given = [
        name
        for name in ("reference_update_steps", "reference_update_weight")
        if getattr(train, name) != getattr(defaults, name)
    ]
    if train.reference_update == "none":
        return [f"train.{name}: set, but train.reference_update is none." for name in given]
    if train.reference_update == "hard" and "reference_update_weight" in given:
        return ["train.reference_update_weight: a hard update has no weight; leave it out."]
    return []


def _cache_problems(config: Config | None) -> list[str]:
    """Settings of stored reference log-probs where none are kept, or where none would be right."""
    if config is None:
        return []
    train = config.train
    if not train.cache_reference:
        given = train.reference_cache_dir is not None
        return ["train.reference_cache_dir: set, but train.cache_reference is false."] * given
    from lora_dpo import objectives

    problems = []
    if train.reference_update != "none":
        problems.append(
            f"train.cache_reference: true, but the reference moves (train.reference_update is "
            f"{train.reference_update}); leave one of the two out."
        )
    try:
        reason = objectives.build(config.objective.to_dict()).needs_running_reference
    except ConfigError:
        reason = ""  # said where the objective is looked at
    return problems + [f"train.cache_reference: true, but {reason}"] * bool(reason)


def _objective_has_none_of(config: Config | None) -> list[str]:
    """Settings of what the objective does not have: a reference, or the metric that is best."""
    if config is None:
        return []
    from lora_dpo import objectives

    try:
        bound = objectives.build(config.objective.to_dict())
    except ConfigError:
        return []  # said where the objective is looked at
    name, problems = config.objective.name, []
    if config.train.reference_update != "none" and not bound.reference:
        problems.append(
            f"train.reference_update: is {config.train.reference_update}, but {name} reads no reference; "
            "leave it out."
        )
    metric = str(config.train.further.get("metric_for_best_model") or "").removeprefix("eval_")
    absent = ["logratios/"] * (not bound.reference)
    absent += ["rewards/"] * (bound.data == "demonstrations")
    if metric.startswith(tuple(absent)):
        problems.append(
            f"train.metric_for_best_model: {metric} is no metric of {name}; expected loss, or one that "
            "it reports."
        )
    return problems


def _train_problems(values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return []
    from lora_dpo.arguments import argument_problems

    ours = set(TrainConfig.model_fields)
    return argument_problems({key: value for key, value in values.items() if key not in ours}, ours)


def _adapter_problems(config: Config | None) -> list[str]:
    if config is None or not config.model.adapter or config.lora == LoraConfig():  # type: ignore[call-arg]
        return []
    return [
        "lora: an adapter that is started from (model.adapter) brings its own rank, alpha and "
        "targets; leave this section out."
    ]


def _path_problems(config: Config | None) -> list[str]:
    """Names that are empty, or longer than any file system takes."""
    if config is None:
        return []
    data = config.data
    places = {
        "model.base": config.model.base,
        "model.adapter": config.model.adapter,
        "data.chat_template": data.chat_template,
        "data.cache_dir": data.cache_dir,
        "train.reference_cache_dir": config.train.reference_cache_dir,
        "output.dir": config.output.dir,
    }
    for name, sources in (("train", data.train), ("eval", data.eval or [])):
        places |= {f"data.{name}.{i}.path": source.path for i, source in enumerate(sources)}
    problems = []
    for where, path in places.items():
        if path is None:
            continue
        if not path.strip():
            problems.append(f"{where}: got {path!r}; expected a name.")
        elif len(path.encode()) > 4095 or any(len(p.encode()) > 255 for p in path.split("/")):
            problems.append(
                f"{where}: got {told(path)}; a name of {len(path)} characters is longer than file "
                "systems take."
            )
    return problems
