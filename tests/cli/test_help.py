"""``--help`` and the options: short, complete, and the same as the settings that declare them."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from lapora import config
from lapora.cli.app import COMMANDS, app, run
from lapora.config import PANELS, declared, options_of

LINES = {"fit": 60, "calibrate": 61, "eval": 66, "tune-prior": 48, "predict": 52}
SETTINGS = [
    each
    for each in vars(config).values()
    if inspect.isclass(each) and dataclasses.is_dataclass(each) and each.__name__.endswith("Settings")
]
OPTIONS = [(settings, option) for settings in SETTINGS for option in options_of(settings).values()]
TAKEN = {
    "fit": ["ModelSettings", "DataSettings", "FitSettings"],
    "tune-prior": ["ModelSettings", "DataSettings", "PriorSettings"],
    "predict": ["ModelSettings", "PredictSettings"],
    "eval": ["ModelSettings", "DataSettings", "EvalSettings", "CheckpointSettings"],
}


def help_of(monkeypatch, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def parameters_of(command: str) -> dict[str, object]:
    group = typer.main.get_command(app)
    return {flag: each for each in group.commands[command].params for flag in each.opts}


def run_with(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["lapora", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_is_short_and_in_plain_text(command, monkeypatch):
    page = help_of(monkeypatch, *filter(None, [command]), "--help")
    assert page == help_of(monkeypatch, *filter(None, [command]), "-h")
    lines = page.splitlines()
    assert len(lines) <= LINES.get(command, 24) and max(map(len, lines)) <= 80
    assert "range" not in page and "x>=" not in page and "[[" not in page and "list[" not in page
    assert page.startswith("Usage: ") and page.count("-h, --help") == 1
    if command:
        assert f"lapora {command} " in page.partition("Examples")[2] or command == "demo"
        assert all(flag in page for flag in parameters_of(command) if flag.startswith("-"))


@pytest.mark.parametrize("command", TAKEN)
def test_large_commands_have_panels_in_order(command, monkeypatch):
    lines = help_of(monkeypatch, command, "--help").splitlines()
    panels = [line.partition(" ─")[0] for line in lines if line.endswith("───")]
    assert panels == [*(panel for panel in PANELS if panel in panels), "Examples"]
    assert panels[-4:] == ["Model", "Output", "Advanced", "Examples"]


def test_examples_are_commands_that_parse(monkeypatch):
    """Every example line, but for the program's own start, is parsed without an unknown option."""
    import shlex

    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        for line in (command.epilog or "").splitlines():
            if "lapora" not in line:
                continue
            words = shlex.split(line.partition("lapora ")[2].partition(" > ")[0])
            assert words[0] == name
            command.make_context(name, words[1:], resilient_parsing=False)


@pytest.mark.parametrize(("settings", "option"), OPTIONS, ids=lambda each: getattr(each, "name", None))
def test_help_of_an_option_names_every_choice(settings, option):
    text = option.option.help
    assert text[0].isupper() or text.startswith((*option.choices, "auto", "OWNER"))
    assert text.endswith((".", "...")) and option.option.panel in PANELS
    refused = {"map"} if settings.__name__ == "PriorSettings" and option.name == "link" else set()
    for choice in option.choices:
        assert choice in text or choice in refused, f"{settings.__name__}.{option.name}: {choice}"
    assert not option.option.synonyms or set(option.option.synonyms.values()) <= set(option.choices)
    assert (
        isinstance(option.default, bool)
        or option.option.metavar
        or not option.flag.startswith("-")
        or (not option.option.command_line)
    )


@pytest.mark.parametrize("command", TAKEN)
def test_a_command_has_every_option_of_its_settings(command):
    found = parameters_of(command)
    own = {
        option.flag
        for name, hint in inspect.get_annotations(inspect.unwrap(COMMANDS[command]), eval_str=True).items()
        if (option := declared(name, hint)) is not None and option.flag.startswith("-")
    }
    expected = set()
    for name in TAKEN[command]:
        for option in options_of(getattr(config, name)).values():
            if option.option.command_line and option.flag.startswith("-"):
                expected |= {option.flag, *option.option.also}
                parameter = found[option.flag]
                assert set(option.option.also) <= set(parameter.opts)
                if (command, option.flag) != ("fit", "--split"):
                    given = tuple(parameter.default) if option.several else parameter.default
                    assert given == (option.option.none if option.default is None else option.default)
    assert {flag for flag in found if flag.startswith("--")} == expected | own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "x", "--structure", "kfac"), "did you mean kron?"),
        (("fit", "x", "--dtype", "bf16"), "did you mean bfloat16?"),
        (("fit", "x", "--fisher", "empircal"), "did you mean empirical?"),
        (("eval", "x", "--link", "porbit"), "did you mean probit?"),
        (("eval", "x", "--methods", "map,dropout"), "--methods dropout"),
        (("evaluate", "x"), "Did you mean 'eval'?"),
        (("predict", "x", "--lnik", "map"), "did you mean --link?"),
        (("fit", "x", "--limit", "0", "--rank", "0"), "--limit 0: at least 1"),
        (("fit", "x", "--limit", "0", "--rank", "0"), "--rank 0: at least 1"),
        (("fit", "x", "--rank", "whole"), "--rank whole: full, or a positive number"),
        (("fit", "x", "--batch-size", "many"), "auto, or a positive number"),
        (("eval", "x", "--coverage", "0"), "above 0, at most 1"),
        (("predict", "x", "--abstain-below", "1.5"), "at least 0, at most 1"),
        (("predict", "x", "--adapter-field", "a"), "--adapter"),
    ],
)
def test_mistakes_are_named_with_what_was_meant(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("lapora.cli.arguments.local_model", lambda model, writes: model)
    status, errors = run_with(monkeypatch, capsys, *arguments)
    assert status == 2 and words in errors and len(errors.splitlines()) == 1


def test_the_program_alone_prints_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lapora"])
    with pytest.raises(SystemExit) as ended:
        run()
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (2, "") and "tune-prior" in out


def test_completion_offers_the_choices():
    found = parameters_of("fit")["--structure"].shell_complete(typer.Context(typer.main.get_command(app)), "k")
    assert [getattr(each, "value", each) for each in found] == ["kron"]


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom lapora.cli.app import app\n"
        "app(['fit', '--help'], standalone_mode=False); app(['--help'], standalone_mode=False)\n"
        "sys.exit(any(each in sys.modules for each in ('torch', 'numpy', 'transformers', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_every_settings_class_is_an_option_table():
    """No field is left out by accident: those without an option are named here."""
    missing = {
        f"{each.__name__}.{field.name}"
        for each in SETTINGS
        for field in dataclasses.fields(each)
        if field.name not in options_of(each)
    }
    assert missing == {"ModelSettings.fetched"}
    assert all(get_args(option.hint) or isinstance(option.hint, type) for _, option in OPTIONS)
