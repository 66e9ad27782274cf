"""The house: its drawing is its imports, and what is built from it works."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import lapora

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lapora"
EVERYBODYS = {"config", "errors", "_version", "distributed"}


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lapora":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lapora.")}
    return found


def test_the_drawing_is_the_imports():
    drawn = {
        room: set(targets.split(", "))
        for room, targets in re.findall(r"^(\w+) +-> (.+)$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    }
    actual: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        actual.setdefault(room, set()).update(imported_rooms(file) - EVERYBODYS - {room})
    assert drawn == {room: targets for room, targets in actual.items() if targets}


def test_the_picture_of_the_architecture_is_what_its_program_draws():
    program = runpy.run_path(str(ROOT / "docs" / "figures" / "architecture.py"))
    assert (ROOT / "docs" / "figures" / "architecture.svg").read_text(encoding="utf-8") == program["draw"]()
    modules = {where for where, _ in (*program["FIT"], *program["PREDICT"])}
    assert all((SOURCE / f"{module.replace('.', '/')}.py").is_file() for module in modules)


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert paper["title"] == "Bayesian low-rank adaptation for large language models"
    assert [author["family-names"] for author in paper["authors"]] == ["Yang", "Robeyns", "Wang", "Aitchison"]


def test_the_hooks_before_a_commit_are_what_lint_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in local["hooks"]}
    linted = set(
        re.findall(
            r"\$\(BIN\)/((?:ruff|mypy|lint-imports)[\w -]*?)(?: \.| --check \.)?$",
            (ROOT / "Makefile").read_text(),
            re.M,
        )
    )
    assert hooks == linted


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    kept = ("src", "pyproject.toml", "README.md", "LICENSE")
    for name in kept:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            (folder / "tree").mkdir(exist_ok=True)
            shutil.copy(source, folder / "tree" / name)

    def build(tree: Path, what: str) -> Path:
        script = f"import setuptools.build_meta as backend; backend.build_{what}({str(folder)!r})"
        subprocess.run([sys.executable, "-c", script], cwd=tree, check=True, capture_output=True, timeout=120)
        (found,) = folder.glob("*.tar.gz" if what == "sdist" else "*.whl")
        return found

    sdist = build(folder / "tree", "sdist")
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    (tree,) = (folder / "unpacked").iterdir()
    return build(tree, "wheel")


def test_the_wheel_holds_what_the_package_needs(built):
    names = set(zipfile.ZipFile(built).namelist())
    wanted = {
        f"lapora/{file.relative_to(SOURCE)}"
        for file in SOURCE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert wanted <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_installed_runs(built, tmp_path):
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*pip, str(built)], check=True, capture_output=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    assert run("-c", "import lapora; print(lapora.__file__)").startswith(str(installed))
    assert run("-m", "lapora", "--version") == f"lapora {lapora.__version__}\n"
    assert "\ntask: boolq\n" in run("-m", "lapora", "tasks", "boolq")


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_completion_is_installed_and_completes(shell, file, tmp_path):
    command = Path(sys.executable).with_name("lapora")
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [command, "--install-completion", shell], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / file).is_file()
    asked = {**environment, "_LAPORA_COMPLETE": f"complete_{shell}", "COMP_WORDS": "lapora tu", "COMP_CWORD": "1"}
    asked["_TYPER_COMPLETE_ARGS"] = "lapora tu"
    done = subprocess.run([command], env=asked, capture_output=True, text=True, timeout=60)
    assert "tune-prior" in done.stdout
