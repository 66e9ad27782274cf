"""The options of a command, made from the settings in :mod:`lapora.config` that it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from lapora.cli.console import set_rank
from lapora.config import ONE_PANEL, OUTPUT, PANELS, DeclaredOption, ModelSettings, Option, declared, options_of
from lapora.distributed import init_processes, is_launched
from lapora.errors import UsageError
from lapora.models.adapter import local_model

JsonOption = Annotated[bool, Option("Print JSON on standard output.", OUTPUT, flag="--json")]


class Fields:
    """What a command changes in the options of a settings class.

    ``Annotated[DataSettings, Fields("split", "limit", limit={"help": "Validation rows."})]`` has two of the
    options, one of them with another help.

    Args:
        only: Fields that are options; by default all. A model of some fields is not prepared (:func:`command`).
        changed: By field, attributes of its :class:`lapora.config.Option` to replace, and its ``default``.
    """

    def __init__(self, *only: str, **changed: Mapping[str, Any]) -> None:
        self.only = only
        self.changed = changed

    def options(self, settings: type) -> dict[str, DeclaredOption]:
        """Return the options of a settings class, by field, as the command has them."""
        found = {name: each for name, each in options_of(settings).items() if each.option.command_line}
        if self.only:
            found = {name: found[name] for name in self.only}
        for name, changes in self.changed.items():
            rest = dict(changes)
            default = rest.pop("default", found[name].default)
            found[name] = replace(found[name], option=replace(found[name].option, **rest), default=default)
        return found


@dataclass(frozen=True)
class _Group:
    """A parameter of a command that is a settings object."""

    name: str
    settings: type
    several: bool
    partial: bool
    options: dict[str, DeclaredOption]


def command(*, writes: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose parameters are settings, and options of its own.

    A parameter that is a settings class of :mod:`lapora.config` becomes one option per field; two classes with a flag
    of the same name share the option. Any other parameter is ``Annotated[type, Option(...)]``. ``models:
    list[ModelSettings]`` takes several adapters. A model with all its options is prepared: its adapter is fetched from
    the Hub, and the processes of a launcher are joined.

    Args:
        writes: Whether the command writes a posterior, which cannot go into the cache of the Hub.

    Raises:
        UsageError: By the command: options that contradict each other.
        AdapterError: By the command: the Hub has no such adapter, or cannot be reached.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        defaults = {name: each.default for name, each in inspect.signature(function).parameters.items()}
        groups: list[_Group] = []
        own: dict[str, DeclaredOption] = {}
        options: dict[str, DeclaredOption] = {}
        for name, hint in hints.items():
            if name == "return":
                continue
            if group := _group(name, hint):
                groups.append(group)
                for each in group.options.values():
                    options.setdefault(_key(each), each)
                continue
            default = MISSING if defaults[name] is inspect.Parameter.empty else defaults[name]
            option = declared(name, hint, default)
            assert option is not None, f"{function.__name__}: {name} has no Option"
            own[name] = options[_key(option)] = option

        @functools.wraps(function)
        def run(**words: Any) -> None:
            values = {key: _converted(each, words[key]) for key, each in options.items()}
            arguments = {name: values[_key(each)] for name, each in own.items()}
            for group in groups:
                found = {field: values[_key(each)] for field, each in group.options.items()}
                if group.settings is not ModelSettings or group.partial:
                    arguments[group.name] = group.settings(**found)
                else:
                    adapters = found.pop("adapter")
                    models = _models(adapters if group.several else [adapters], found, writes=writes)
                    arguments[group.name] = models if group.several else models[0]
            function(**arguments)

        parameters = [_parameter(key, each) for key, each in _in_order(options)]
        wrapper: Any = run
        wrapper.__signature__ = inspect.Signature(parameters)
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        wrapper.refuse_wrong_values = functools.partial(_refuse_wrong_values, options)  # see cli/help.py
        return run

    return decorate


def _in_order(options: Mapping[str, DeclaredOption]) -> list[tuple[str, DeclaredOption]]:
    """Sort the options by panel, if they are many; positional arguments stay first."""
    flags = [each for each in options.items() if each[1].flag.startswith("-")]
    if len(flags) > ONE_PANEL:
        flags.sort(key=lambda each: PANELS.index(each[1].option.panel))
    return [each for each in options.items() if each not in flags] + flags


def _group(name: str, hint: Any) -> _Group | None:
    fields = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Fields)), Fields())
    settings = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    several = get_origin(settings) is list
    if several:
        settings = get_args(settings)[0]
    if not is_dataclass(settings):
        return None
    assert isinstance(settings, type)
    options = fields.options(settings)
    if several:
        several_help = "Folders or Hub ids of LoRA adapters of one base."
        adapter = options["adapter"]
        options["adapter"] = replace(
            adapter, hint=tuple[str, ...], option=replace(adapter.option, help=several_help, flag="ADAPTER...")
        )
    return _Group(name, settings, several, bool(fields.only), options)


def _key(option: DeclaredOption) -> str:
    """Return the name of the parameter for Typer, made from the flag: ``--adapter`` is not the argument ``ADAPTER``."""
    word = option.flag.strip("-.").replace("-", "_").lower()
    return word if option.flag.startswith("-") else f"{word}_argument"


def _parameter(key: str, declared_option: DeclaredOption) -> inspect.Parameter:
    """Describe one option to Typer."""
    option, default, choices = declared_option.option, declared_option.default, declared_option.choices
    kind = str if choices or declared_option.words else declared_option.kind
    about: dict[str, Any] = {
        "help": option.help,
        "rich_help_panel": option.panel,
        "show_default": option.shown or bool(declared_option.default_text),
        "autocompletion": _completion(choices) if choices else None,
    }
    hint = list[kind] if declared_option.several else kind if kind is bool else kind | None  # type: ignore[valid-type]
    if declared_option.flag.startswith("-"):
        flags = sorted((declared_option.flag, *option.also), key=len)
        info: Any = typer.Option(*flags, metavar=option.metavar, **about)
    else:
        info = typer.Argument(metavar=declared_option.flag, **about)
        hint = hint if default is not MISSING or declared_option.several else kind
    if default is MISSING:
        default = inspect.Parameter.empty
    elif declared_option.several:
        default = list(default)
    elif default is None:
        default = option.none
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info])


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _refuse_wrong_values(options: Mapping[str, DeclaredOption], words: Mapping[str, Any]) -> None:
    """Check all values of the command line.

    Raises:
        UsageError: Wrong values; the message names every one.
    """
    problems = []
    for key, each in options.items():
        found = _converted(each, words[key])
        for value in found if each.several else [found]:
            if problem := each.problem(value):
                problems.append(f"{each.flag} {value}: {problem}")
    if problems:
        raise UsageError("; ".join(problems))


def _converted(option: DeclaredOption, word: Any) -> Any:
    """Return the value of an option: the word for None as None, several values as a tuple."""
    if option.several:
        return tuple(part.strip() for each in word for part in each.split(",")) if option.option.commas else tuple(word)
    if option.words and word is not None:
        return None if word == option.option.none else int(word) if word.isdecimal() else word
    return word


def _models(adapters: tuple[str, ...] | list[str], settings: dict[str, Any], *, writes: bool) -> list[ModelSettings]:
    """Join the processes of a launcher and fetch the adapters.

    Raises:
        UsageError: Options that contradict each other, or an adapter on the Hub without a folder to write to.
        AdapterError: The Hub has no such adapter, or cannot be reached.
    """
    if settings["device_map"] is not None and is_launched():
        raise UsageError("--device-map runs in one process, which spreads the model: start it without a launcher")
    folder = settings["output_dir"]
    if folder is not None and len({Path(adapter).name for adapter in adapters}) < len(adapters):
        raise UsageError("--output-dir: two adapters have folders of one name; fit them one by one")
    processes, device = init_processes(settings["device"])
    set_rank(processes.rank)
    shared = ModelSettings("", **{**settings, "device": device, "processes": processes})
    _ = shared.placement  # refuse options that contradict each other before anything is fetched
    found = []
    for adapter in adapters:
        here = folder / Path(adapter).name if folder and len(adapters) > 1 else folder
        found.append(local_model(replace(shared, adapter=adapter, output_dir=here), writes=writes))
    return found
