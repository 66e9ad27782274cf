"""Ended at any moment, `fit` and `tune-prior` leave the old posterior or the new one, and `--resume` goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lapora
from lapora.config import FitSettings, ModelSettings, PriorSettings
from lapora.curvature.passes import Linearisation
from lapora.errors import LaporaWarning, PosteriorError, UsageError
from lapora.models.adapter import read_adapter
from lapora.models.loading import load_model
from lapora.storage import saved as saved_posterior
from lapora.storage.files import write_lock
from lapora.storage.saved import SavedPosterior
from lapora.workflows import fit as fit_workflow
from lapora.workflows.fit import fit
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import data_of, fit_tiny, make_adapter, make_rows, model_of

STRUCTURES = {
    "kron": {},
    "kron-sketched": {"structure": "kron", "rank": 2},
    "kron-mc": {"fisher": "mc"},
    "ekfac": {"structure": "ekfac"},
    "diag": {"structure": "diag"},
    "lowrank": {"structure": "lowrank", "rank": 4},
    "full": {"structure": "full"},
}
SMALL_BATCHES = {"model": {"batch_size": 2}}


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_adapter(tmp_path)


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "factors.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Ended(BaseException):
    """Stands for the process's end: nothing catches it."""


def end_after(monkeypatch, batches: int) -> None:
    """End the fit after so many batches of its passes, counted together."""
    left = [batches]
    run = Linearisation.run

    def counted(self, batch, directions):
        if left[0] == 0:
            raise Ended
        left[0] -= 1
        return run(self, batch, directions)

    monkeypatch.setattr(Linearisation, "run", counted)


@pytest.mark.parametrize("settings", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("batches", [1, 7, 11])
def test_a_resumed_fit_gives_the_same_factors_bit_for_bit(tiny, monkeypatch, settings, batches):
    whole = fit_tiny(tiny, name="whole", **SMALL_BATCHES, **settings)
    with monkeypatch.context() as patched, pytest.raises(Ended):
        end_after(patched, batches)
        fit_tiny(tiny, name="cut", save_every=0.0, **SMALL_BATCHES, **settings)
    partial = tiny / "adapter" / "laplace" / ".cut.partial"
    assert list(partial.iterdir())
    with monkeypatch.context() as patched:
        end_after(patched, (24 if settings.get("structure") == "ekfac" else 12) - batches)  # what is left, no more
        resumed = fit_tiny(tiny, name="cut", resume=True, save_every=0.0, **SMALL_BATCHES, **settings)
    assert same(factors(whole.folder), factors(resumed.folder))
    assert resumed.log_likelihood == whole.log_likelihood
    assert any("resumed after" in note for note in resumed.notes)
    assert not partial.exists()


def test_ekfac_resumes_in_its_second_pass(tiny, monkeypatch):
    whole = fit_tiny(tiny, name="whole", structure="ekfac", **SMALL_BATCHES)
    with monkeypatch.context() as patched, pytest.raises(Ended):
        end_after(patched, 17)
        fit_tiny(tiny, name="cut", structure="ekfac", save_every=0.0, **SMALL_BATCHES)
    with monkeypatch.context() as patched:
        end_after(patched, 7)
        resumed = fit_tiny(tiny, name="cut", structure="ekfac", resume=True, **SMALL_BATCHES)
    assert same(factors(whole.folder), factors(resumed.folder))


def test_resuming_something_else_is_refused_with_every_difference(tiny, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Ended):
        end_after(patched, 3)
        fit_tiny(tiny, save_every=0.0, **SMALL_BATCHES)
    with pytest.raises(PosteriorError, match=r"batch_size 2 then, 3 now; seed 0 then, 4 now"):
        fit_tiny(tiny, resume=True, model={"batch_size": 3}, seed=4)
    (tiny / "data" / "train.jsonl").write_text((tiny / "data" / "validation.jsonl").read_text())
    with pytest.raises(PosteriorError, match=r"data.fingerprint .*; data.n 24 then, 12 now; tokens"):
        fit_tiny(tiny, resume=True, **SMALL_BATCHES)
    fit_tiny(tiny, **SMALL_BATCHES)  # without --resume it is thrown away


def test_damaged_sums_are_refused(tiny, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Ended):
        end_after(patched, 3)
        fit_tiny(tiny, save_every=0.0, **SMALL_BATCHES)
    file = tiny / "adapter" / "laplace" / ".default.partial" / "pass-0.safetensors"
    content = file.read_bytes()
    source = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(PosteriorError, match=r"pass-0|partial"):
            fit_tiny(tiny, resume=True, **SMALL_BATCHES)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PosteriorError, match="without --resume"):
        fit_tiny(tiny, resume=True, **SMALL_BATCHES)


def test_resume_with_nothing_saved_begins_and_says_so(tiny):
    assert any("no checkpoint was found" in note for note in fit_tiny(tiny, resume=True).notes)


@pytest.mark.parametrize("engine", ["asdl", "curvlinops"])
def test_other_engines_do_not_resume(tiny, engine):
    with pytest.raises(UsageError, match="--resume"):
        fit_tiny(tiny, engine=engine, resume=True)


def test_saving_takes_little_time(tiny, monkeypatch):
    from lapora.storage import partial

    now, writes = [0.0], []

    def write(self, state):
        writes.append(now[0])
        now[0] += 3.0  # a slow disk

    monkeypatch.setattr(partial._Pass, "_write", write)
    monkeypatch.setattr(partial.time, "monotonic", lambda: now[0])
    run = Linearisation.run

    def slow(self, batch, directions):
        now[0] += 10.0
        return run(self, batch, directions)

    monkeypatch.setattr(Linearisation, "run", slow)
    fit_tiny(tiny, save_every=20.0, model={"batch_size": 1})
    assert writes == [20.0, 173.0]  # the second waits until the first has cost less than 2 %


def test_every_step_of_the_writing_may_be_the_last(tiny, monkeypatch):
    """The process ends before and after each file operation that replaces a posterior."""
    old = fit_tiny(tiny, seed=0, structure="kron").folder
    before, diag = factors(old), factors(fit_tiny(tiny, name="new", structure="diag").folder)
    outcomes = []
    for step in range(40):
        calls = [0]

        def counting(operation, step=step, calls=calls):
            def wrapped(*arguments, **named):
                calls[0] += 1
                if calls[0] > step:
                    raise Ended
                return operation(*arguments, **named)

            return wrapped

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", counting(Path.rename))
            patched.setattr(Path, "replace", counting(Path.replace))
            patched.setattr(Path, "mkdir", counting(Path.mkdir))
            patched.setattr(saved_posterior, "fsync_path", counting(saved_posterior.fsync_path))
            patched.setattr(saved_posterior, "remove_path", counting(saved_posterior.remove_path))
            patched.setattr(saved_posterior.shutil, "rmtree", counting(saved_posterior.shutil.rmtree))
            try:
                fit_tiny(tiny, structure="diag", overwrite=True)
                finished = True
            except Ended:
                finished = False
        saved = SavedPosterior(old)
        saved.gaussian()
        found = factors(saved.folder)
        assert same(found, before) or same(found, diag)
        outcomes.append("old" if same(found, before) else "new")
        fit_tiny(tiny, structure="kron", overwrite=True)
        assert not [each for each in old.parent.iterdir() if each.name.startswith(".")]
        if finished:
            break
    assert finished and set(outcomes) == {"old", "new"}


def test_a_full_disk_is_one_line_and_the_old_posterior_stands(tiny):
    """A real limit on the size of a file: writing ends with an error in the middle."""
    old = factors(fit_tiny(tiny).folder)
    manifest = (tiny / "adapter" / "laplace" / "default" / "posterior.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, 2_000, 5_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(PosteriorError, match="cannot be written"):
                fit_tiny(tiny, overwrite=True, structure="ekfac", save_every=0.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
        with pytest.raises(PosteriorError, match="the old manifest is unchanged"):
            tune_prior(model_of(tiny), settings=PriorSettings(method="marglik"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert same(factors(tiny / "adapter" / "laplace" / "default"), old)
    assert (tiny / "adapter" / "laplace" / "default" / "posterior.json").read_bytes() == manifest


def test_a_checkpoint_that_cannot_be_written_ends_no_fit(tiny, monkeypatch):
    expected = factors(fit_tiny(tiny, name="plain").folder)
    import safetensors.torch

    write = safetensors.torch.save_file

    def full(tensors, file, *rest):
        if ".partial" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, file, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.warns(LaporaWarning, match=r"cannot be written \(No space left on device\); the fit goes on without"):
        found = fit_tiny(tiny, name="full", save_every=0.0)
    assert same(factors(found.folder), expected)


def test_a_disk_without_room_for_the_posterior_is_noticed_before_the_fit(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(
        PosteriorError, match=r"the posterior takes about .* MiB, and 0.0 are free: free some disk space"
    ):
        fit(model_of(tiny), data_of(tiny), FitSettings(), on_estimate=lambda found: None)
    assert not (tiny / "adapter" / "laplace").exists()


def test_a_disk_that_fills_at_any_write(tiny, monkeypatch):
    folder = fit_tiny(tiny).folder
    old = factors(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for where, name in ((saved_posterior, "fsync_path"), (os, "fsync"), (Path, "replace"), (Path, "rename")):
        with monkeypatch.context() as patched, pytest.raises(PosteriorError, match="No space left"):
            patched.setattr(where, name, full)
            fit_tiny(tiny, overwrite=True, structure="diag")
        SavedPosterior(folder).gaussian()
        assert same(factors(folder), old)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_one_line(tiny):
    (tiny / "adapter").chmod(0o555)
    try:
        with pytest.raises(PosteriorError, match="cannot be written"):
            fit_tiny(tiny)
    finally:
        (tiny / "adapter").chmod(0o755)


def test_a_folder_where_nothing_can_be_made_is_one_line(tiny):
    (tiny / "adapter" / "laplace").write_text("a file stands in the way")
    with pytest.raises(PosteriorError, match="cannot be written"):
        fit_tiny(tiny)


def test_files_in_place_of_the_folders_are_replaced_once_and_for_all(tiny):
    laplace = tiny / "adapter" / "laplace"
    laplace.mkdir()
    for name in ("default", ".default.previous", ".default.new", ".default.partial"):
        (laplace / name).write_text("a file stands in the way")
    with pytest.raises(PosteriorError, match="exists already; give --overwrite"):
        fit_tiny(tiny)
    for _ in range(2):
        SavedPosterior(fit_tiny(tiny, overwrite=True, save_every=0.0).folder).gaussian()
        assert [each.name for each in laplace.iterdir()] == ["default"]


def test_the_second_of_two_writers_is_told_who_is_first(tiny):
    folder = fit_tiny(tiny).folder
    with write_lock(folder):
        for call in (lambda: fit_tiny(tiny, overwrite=True), lambda: tune_prior(model_of(tiny))):
            with pytest.raises(PosteriorError, match=f"process {os.getpid()} is writing it"):
                call()
        fit_tiny(tiny, name="other")
    fit_tiny(tiny, overwrite=True)
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("where", ["files", "memory"])
def test_a_posterior_fitted_while_another_fit_reads_its_rows_is_not_replaced(tiny, monkeypatch, where):
    folder = tiny / "adapter" / "laplace" / "default"
    render = fit_workflow._render
    others = [lambda: fit_tiny(tiny, structure="ekfac")]

    def rendered(*arguments):
        rows = render(*arguments)
        if others:
            others.pop()()
        return rows

    monkeypatch.setattr(fit_workflow, "_render", rendered)
    with pytest.raises(PosteriorError, match="default: exists already; give --overwrite"):
        if where == "files":
            fit_tiny(tiny)
        else:
            there = load_model(read_adapter(tiny / "adapter"), model_of(tiny))
            rows, task = make_rows(6), tiny / "task.yaml"
            lapora.fit_model(there.model, there.tokenizer, rows, task=task, output_dir=tiny / "adapter")
    assert SavedPosterior(folder).manifest.structure == "ekfac"
    assert not list(folder.parent.glob(".*"))


# Real ends: processes that have imported everything already are forked, so that a kill lands in the work itself.


def _fit_until_killed(folder: str, settings: dict[str, object], started) -> None:
    started.set()
    fit_tiny(Path(folder), **SMALL_BATCHES, **settings)


def _tune_until_killed(folder: str, settings: dict[str, object], started) -> None:
    started.set()
    tune_prior(ModelSettings(adapter=str(Path(folder) / "adapter"), device="cpu"), settings=PriorSettings(**settings))


def kill_during(target, folder: Path, settings: dict[str, object], delay: float) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_adapter", "lapora.workflows.predict", "lapora.workflows.tune_prior"])
    started = context.Event()
    process = context.Process(target=target, args=(str(folder), settings, started))
    process.start()
    assert started.wait(120)
    time.sleep(delay)
    process.kill()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed_until_it_is_done(tmp_path, kills):
    """kill -9 at random moments, again and again; every time the fit goes on, and in the end nothing is different."""
    tiny = make_adapter(tmp_path, rows=240)
    source = random.Random(kills)
    done = killed = 0
    while killed < kills:
        name, settings = source.choice([*STRUCTURES.items()])
        whole = fit_tiny(tiny, name=f"whole-{name}", overwrite=True, **SMALL_BATCHES, **settings)
        begun = time.monotonic()
        fit_tiny(tiny, name="measure", overwrite=True, save_every=0.0, **SMALL_BATCHES, **settings)
        length = time.monotonic() - begun
        for _ in range(6):
            if killed == kills:
                break
            again = {"name": "cut", "overwrite": True, "resume": True, "save_every": 0.0, **settings}
            status = kill_during(_fit_until_killed, tiny, again, source.uniform(0.0, length))
            if status == 0:
                done += 1
                break
            assert status == -signal.SIGKILL
            killed += 1
        last = fit_tiny(tiny, name="cut", overwrite=True, resume=True, **SMALL_BATCHES, **settings)
        assert same(factors(whole.folder), factors(last.folder)), name
        assert not list(whole.folder.parent.glob(".cut*"))
    assert killed == kills


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_while_overwriting_or_tuning_leaves_the_old_or_the_new(tmp_path, kills):
    tiny = make_adapter(tmp_path)
    kron, diag = (
        factors(fit_tiny(tiny, name=name, structure=name, **SMALL_BATCHES).folder) for name in ("kron", "diag")
    )
    folder = fit_tiny(tiny, **SMALL_BATCHES).folder
    begun = time.monotonic()
    fit_tiny(tiny, overwrite=True, **SMALL_BATCHES)
    length = time.monotonic() - begun
    source = random.Random(kills)
    for index in range(kills):
        if index % 2:
            prior = SavedPosterior(folder).prior.precisions.precisions
            settings = {"method": "marglik", "optimizer": "adam", "steps": source.randint(1, 400)}
            kill_during(_tune_until_killed, tiny, settings, source.uniform(0.0, 0.1))
            after = SavedPosterior(folder).prior.precisions.precisions
            assert after.keys() == prior.keys() and all(value > 0 for value in after.values())
        else:
            settings = {"overwrite": True, "structure": source.choice(["kron", "diag"])}
            kill_during(_fit_until_killed, tiny, settings, source.uniform(0.5 * length, 1.1 * length))
        saved = SavedPosterior(folder)
        saved.gaussian()
        found = factors(saved.folder)
        assert same(found, diag if saved.content["structure"] == "diag" else kron)
    fit_tiny(tiny, overwrite=True)
    assert not list(folder.parent.glob(".*"))


@pytest.mark.slow
def test_the_command_itself_killed_and_resumed(tmp_path):
    """The same through `python -m lapora`; two at once, too: the second ends with status 4 and names the first."""
    tiny = make_adapter(tmp_path, rows=20_000)
    command = [sys.executable, "-m", "lapora", "fit", str(tiny / "adapter"), "--data", str(tiny / "task.yaml")]
    command += ["--data-dir", str(tiny / "data"), "--batch-size", "2", "--save-every", "0.2", "--device", "cpu"]
    whole = fit(model_of(tiny, batch_size=2), data_of(tiny), _settings("whole"))
    for index in range(3):
        with subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE) as process:
            partial = tiny / "adapter" / "laplace" / ".default.partial" / "pass-0.safetensors"
            seen = partial.stat().st_mtime_ns if partial.exists() else 0
            for _ in range(1200):
                if partial.exists() and partial.stat().st_mtime_ns != seen:
                    break
                time.sleep(0.05)
            if index == 0:
                second = subprocess.run([*command, "--resume"], capture_output=True, text=True)
                assert second.returncode == 4 and f"process {process.pid} is writing it" in second.stderr
            process.kill()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0 and "resumed after" in done.stderr, done.stderr
    assert same(factors(whole.folder), factors(whole.folder.with_name("default")))
    assert json.loads((whole.folder.with_name("default") / "posterior.json").read_text())["prior"]


def _settings(name: str):
    from lapora.config import FitSettings

    return FitSettings(name=name)


def test_a_copy_of_an_adapter_carries_its_posterior(tiny):
    folder = fit_tiny(tiny).folder
    shutil.copytree(tiny / "adapter", tiny / "copy")
    assert same(factors(folder), factors(tiny / "copy" / "laplace" / "default"))
