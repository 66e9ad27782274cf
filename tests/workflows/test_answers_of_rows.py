"""Fit, tune, predict and evaluate with answers of several tokens, of their own in each row, and handed in."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from lapora.config import DataSettings, EvalSettings, PredictSettings, PriorSettings
from lapora.errors import DataError, UsageError
from lapora.likelihoods.base import ScoreOptions
from lapora.models import outputs as outputs_module
from lapora.storage.saved import SavedPosterior
from lapora.workflows.evaluate import evaluate, run_evaluation
from lapora.workflows.predict import predict
from lapora.workflows.task_model import open_fitted
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import WORDS, command, fit_tiny, make_adapter, make_rows, model_of

OPTIONS = ["the cows", "anna", "the loud sheep", "boris is quiet", "office"]


def own_rows(count: int, seed: int, counts=(2, 3, 4)) -> list[dict[str, object]]:
    source = random.Random(seed)
    found = []
    for row in make_rows(count, seed):
        options = source.sample(OPTIONS, source.choice(counts))
        found.append({"story": row["story"], "options": options, "label": source.randrange(len(options))})
    return found


def write(folder: Path, split: str, rows: list[dict[str, object]]) -> None:
    (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def use_task(folder: Path, **keys: object) -> None:
    task = yaml.safe_load((folder / "task.yaml").read_text())
    (folder / "task.yaml").write_text(yaml.safe_dump({**task, **keys}, sort_keys=False))


@pytest.fixture
def own(tmp_path) -> Path:
    """An adapter with rows that have two to four answers of their own."""
    make_adapter(tmp_path)
    use_task(tmp_path, doc_to_choice="{{options}}", doc_to_target="{{label}}")
    write(tmp_path, "train", own_rows(20, 1))
    write(tmp_path, "validation", own_rows(12, 2))
    return tmp_path


def predicted(folder: Path, rows, **settings) -> list[dict]:
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    return list(predict(model_of(folder), PredictSettings(**settings), lines))


@functools.cache
def opened(folder: Path):
    return open_fitted(model_of(folder), "default")


def plain_log_p(folder: Path, prompt: str, answers: list[str]) -> torch.Tensor:
    fitted = opened(folder)
    tokenizer, network = fitted.model.loaded.tokenizer, fitted.model.outputs.network
    scores = []
    for answer in answers:
        before, ids = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
        log_p = torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), dim=1)
        scores.append(sum(log_p[place - 1, ids[place]] for place in range(len(before), len(ids))))
    return torch.log_softmax(torch.stack(scores), dim=0).detach()


def test_fixed_answers_of_several_tokens(tmp_path):
    make_adapter(tmp_path)
    use_task(tmp_path, doc_to_choice=["the cows", "anna is loud"])
    done = fit_tiny(tmp_path)
    assert "whole answers are scored: answer 'the cows' is 2 tokens in this tokenizer, not one" in done.notes
    manifest = SavedPosterior(done.folder).manifest
    assert manifest.answers.score == "sum" and manifest.answers.token_ids is None
    assert manifest.answers.choices == ["the cows", "anna is loud"]
    row = make_rows(1, 9)[0]
    (record,) = predicted(tmp_path, [row])
    assert list(record["probabilities"]) == ["the cows", "anna is loud"] and "answers" not in record
    expected = plain_log_p(tmp_path, f"{row['story']} ?", ["the cows", "anna is loud"]).exp().tolist()
    assert list(record["map_probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    labels = [example["label"] for example in map(json.loads, (tmp_path / "data/train.jsonl").read_text().splitlines())]
    stories = [
        example["story"] for example in map(json.loads, (tmp_path / "data/train.jsonl").read_text().splitlines())
    ]
    likelihood = sum(
        float(plain_log_p(tmp_path, f"{story} ?", ["the cows", "anna is loud"])[label])
        for story, label in zip(stories[:24], labels[:24], strict=True)
    )
    assert done.log_likelihood == pytest.approx(likelihood, abs=1e-3)


@pytest.mark.parametrize("score", ["per_token", "per_byte"])
def test_the_score_is_the_task_s_and_is_recorded(own, score):
    use_task(own, answer_score=score)
    done = fit_tiny(own)
    assert SavedPosterior(done.folder).manifest.answers.score == score
    assert SavedPosterior(done.folder).manifest.task["answer_score"] == score
    row = own_rows(1, 9)[0]
    (record,) = predicted(own, [row])
    single = plain_log_p(own, f"{row['story']} ?", row["options"])
    assert record["map_probabilities"] != pytest.approx(single.exp().tolist(), abs=1e-3)


def test_rows_with_answers_of_their_own_keep_their_numbers(own):
    done = fit_tiny(own)
    manifest = SavedPosterior(done.folder).manifest
    assert manifest.answers.choices == [] and manifest.answers.score == "sum"
    rows = own_rows(9, 5)
    together = predicted(own, rows)
    for row, record in zip(rows, together, strict=True):
        assert record["answers"] == row["options"] and record["prediction"] in row["options"]
        assert len(record["probabilities"]) == len(row["options"])
        assert sum(record["probabilities"]) == pytest.approx(1.0)
        expected = plain_log_p(own, f"{row['story']} ?", row["options"]).exp().tolist()
        assert record["map_probabilities"] == pytest.approx(expected, abs=1e-5)
        (alone,) = predicted(own, [row])
        assert alone["probabilities"] == pytest.approx(record["probabilities"], abs=1e-6)
        (with_logits,) = predicted(own, [row], logits=True)
        assert len(with_logits["logits"]["mean"]) == len(row["options"])


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "lowrank", "full"])
def test_every_structure_and_command_takes_them(own, structure):
    fit_tiny(own, structure=structure, prior_method="averaged" if structure == "kron" else "marglik")
    tuned = tune_prior(model_of(own), DataSettings(split="validation"), PriorSettings(method="auto"))
    assert tuned.prior["averaged"]["n"] == 6
    record = evaluate(model_of(own), DataSettings())
    assert record["n"] == 6 and [each["method"] for each in record["results"]] == ["constant", "map", "laplace"]
    assert all(each["nll"] < 50 and 0 <= each["ece"] <= 1 for each in record["results"])


def test_evaluation_scores_each_row_over_its_own_answers(own):
    fit_tiny(own)
    found = run_evaluation(model_of(own), DataSettings(), EvalSettings(methods=("constant", "map", "laplace")))
    rows = own_rows(12, 2)
    by_method = {each.method: each.table for each in found.predictions}
    log_p = [plain_log_p(own, f"{row['story']} ?", row["options"]) for row in rows]
    nll = -sum(float(row_p[row["label"]]) for row_p, row in zip(log_p, rows, strict=True)) / len(rows)
    accuracy = sum(int(row_p.argmax()) == row["label"] for row_p, row in zip(log_p, rows, strict=True)) / len(rows)
    results = {each["method"]: each for each in found.record["results"]}
    assert results["map"]["nll"] == pytest.approx(nll, abs=1e-5)
    assert results["map"]["accuracy"] == pytest.approx(accuracy)
    for table in by_method.values():
        assert torch.isneginf(table).sum(dim=1).tolist() == [4 - len(row["options"]) for row in rows]
        torch.testing.assert_close(table.exp().sum(dim=1), torch.ones(12, dtype=torch.float64))


def test_a_row_with_more_answers_changes_no_number_of_the_others(own):
    """The tables of a split are as wide as its row with the most answers; what is behind a row's own has no part."""
    few = own_rows(6, 8, (2,))
    fit_tiny(own, prior_method="averaged")
    settings = EvalSettings(methods=("map", "laplace"), links=("mc-joint", "mc-indep", "probit", "bridge"))
    found = []
    for rows in (few, [*few, *own_rows(1, 9, (4,))]):
        write(own, "validation", rows)
        found.append(run_evaluation(model_of(own), DataSettings(), settings))
    for narrow, wide in zip(found[0].predictions, found[1].predictions, strict=True):
        assert narrow.table.shape == (6, 2) and wide.table.shape == (7, 4)
        assert torch.equal(wide.table[:6, :2], narrow.table) and bool(torch.isneginf(wide.table[:6, 2:]).all())
        labels, options = found[0].targets, ScoreOptions()
        likelihood = found[0].likelihood
        assert likelihood.scores(wide.table[:6], labels, options) == likelihood.scores(narrow.table, labels, options)


def test_adapted_evidence_is_refused_where_rows_have_other_numbers_of_answers(own):
    fit_tiny(own, structure="full")
    with pytest.raises(UsageError, match="labelled rows that all have the same number of answers"):
        tune_prior(model_of(own), DataSettings(), PriorSettings(method="adapted"))


@pytest.mark.parametrize("fixed", [True, False])
def test_a_prompt_with_answers_is_scored_by_any_causal_posterior(tmp_path, fixed):
    make_adapter(tmp_path)
    if not fixed:
        use_task(tmp_path, doc_to_choice="{{options}}", doc_to_target="{{label}}")
        write(tmp_path, "train", own_rows(20, 1))
    fit_tiny(tmp_path)
    line = {"prompt": "the cows are loud ?", "answers": ["anna", "the quiet barn", "no"], "id": "a"}
    ordinary = make_rows(1, 3)[0] if fixed else own_rows(1, 3)[0]
    mixed = predicted(tmp_path, [line, ordinary, line])
    (alone,) = predicted(tmp_path, [line])
    expected = plain_log_p(tmp_path, line["prompt"], line["answers"]).exp().tolist()
    for record in (mixed[0], mixed[2], alone):
        assert record["answers"] == line["answers"] and record["id"] == "a"
        assert record["map_probabilities"] == pytest.approx(expected, abs=1e-5)
        assert record["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
        assert record["probabilities"] != record["map_probabilities"]


GIVEN = {"prompt": "the cows are loud ?", "answers": ["anna", "the quiet barn", "no"]}


def fitted_on_the_output_layer(folder: Path, *, fixed: bool, subset: str = "lora", **lora: object) -> None:
    make_adapter(folder, **lora)
    if not fixed:
        use_task(folder, doc_to_choice="{{options}}", doc_to_target="{{label}}")
        write(folder, "train", own_rows(20, 1))
    fit_tiny(folder, subset=subset)


@pytest.mark.parametrize(
    ("subset", "lora"),
    [
        ("lora", {"target_modules": ["v_proj", "lm_head"]}),
        ("all", {"modules_to_save": ["lm_head"]}),
        ("last-layer", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_single_token_posteriors_of_the_output_layer_refuse_other_answers(
    tmp_path, monkeypatch, capfdbinary, subset, lora
):
    """Only the rows of the output layer for the answers have a posterior."""
    fitted_on_the_output_layer(tmp_path, fixed=True, subset=subset, **lora)
    ordinary = make_rows(1, 3)[0]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in (ordinary, GIVEN))
    status, out, err = command(
        monkeypatch, capfdbinary, "predict", tmp_path / "adapter", "--device", "cpu", stdin=lines
    )
    (record,) = map(json.loads, out.splitlines())
    assert status == 5 and list(record["probabilities"]) == ["no", "yes"]
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "line 2: the posterior was fitted on answers of one token" in errors[0]


def test_a_posterior_without_the_saved_output_layer_scores_other_answers(tmp_path):
    fitted_on_the_output_layer(tmp_path, fixed=True, modules_to_save=["lm_head"])
    (record,) = predicted(tmp_path, [GIVEN])
    expected = plain_log_p(tmp_path, GIVEN["prompt"], GIVEN["answers"]).exp().tolist()
    assert record["map_probabilities"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("subset", "lora"),
    [("lora", {"target_modules": ["v_proj", "lm_head"]}), ("last-layer", {"modules_to_save": ["lm_head"]})],
)
def test_whole_answer_posteriors_of_the_output_layer_score_all_answers(tmp_path, subset, lora):
    """Of one token or of several, of the task's rows or given: each row of the output layer has a posterior."""
    fitted_on_the_output_layer(tmp_path, fixed=False, subset=subset, **lora)
    single = {"prompt": "anna is ?", "answers": ["no", "yes"]}
    ordinary = own_rows(1, 3)[0]
    found = predicted(tmp_path, [GIVEN, single, ordinary])
    for row, record in zip((GIVEN, single), found[:2], strict=True):
        expected = plain_log_p(tmp_path, row["prompt"], row["answers"]).exp().tolist()
        assert record["map_probabilities"] == pytest.approx(expected, abs=1e-5)
        assert record["probabilities"] != pytest.approx(expected, abs=1e-4)
    assert found[2]["answers"] == ordinary["options"]


@pytest.mark.parametrize("fixed", [True, False])
def test_rows_of_other_answers_are_evaluated_or_refused(tmp_path, fixed, monkeypatch, capfdbinary):
    """A posterior of fixed answers is of those alone; one of rows with their own answers takes any."""
    fitted_on_the_output_layer(tmp_path, fixed=fixed, target_modules=["v_proj", "lm_head"])
    write(tmp_path, "validation", [{**row, "options": ["no", "the cows"]} for row in own_rows(8, 2, (2,))])
    use_task(tmp_path, doc_to_choice="{{options}}" if fixed else ["quiet", "the cows"], doc_to_target="{{label}}")
    if fixed:
        write(tmp_path, "validation", own_rows(8, 2))
    arguments = ("--data", tmp_path / "task.yaml", "--device", "cpu", "--json")
    status, out, err = command(monkeypatch, capfdbinary, "eval", tmp_path / "adapter", *arguments)
    if not fixed:
        assert status == 0 and json.loads(out)["n"] == 8
        return
    (error,) = [line for line in err.splitlines() if line.startswith("error")]
    assert status == 4 and "answers no, yes then, " in error


def test_bad_lines_are_one_line_each(own, monkeypatch, capfdbinary):
    fit_tiny(own)
    good = own_rows(1, 3)[0]
    bad = [
        {**good, "options": ["anna"]},
        {**good, "options": []},
        {**good, "options": ["anna", "anna"]},
        {**good, "options": ["anna", "a zebra"]},
        {"prompt": "the cows", "answers": ["anna"]},
        {**good, "story": "the cows " * 40},
        {**good, "options": ["anna", "the " * 60]},
    ]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in [good, *bad])
    arguments = ("predict", own / "adapter", "--device", "cpu", "--on-error", "report")
    status, out, _ = command(monkeypatch, capfdbinary, *arguments, stdin=lines)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 5 and "error" not in records[0]
    expected = [
        "line 2: doc_to_choice: at least two answers are required, not 1",
        "line 3: doc_to_choice: at least two answers are required, not 0",
        "line 4: doc_to_choice: duplicate answer 'anna'",
        "line 5: answer 'a zebra' has text that is not in the tokenizer's vocabulary",
        "line 6: answers: at least two answers are required, not 1",
        "line 7: its prompt and longest answer have",
        "line 8: answer 'the the",
    ]
    for record, message in zip(records[1:], expected, strict=True):
        assert record["error"].startswith(message), record


def test_a_single_row_may_not_leave_the_task_s_answers(tmp_path):
    make_adapter(tmp_path)
    use_task(tmp_path, doc_to_choice="{{options}}", doc_to_target="{{label}}")
    same = [{**row, "options": ["the cows", "anna"]} for row in make_rows(8)]
    write(tmp_path, "train", same)
    done = fit_tiny(tmp_path)
    assert SavedPosterior(done.folder).manifest.answers.choices == ["the cows", "anna"]
    with pytest.raises(DataError, match="all rows must have the same"):
        predicted(tmp_path, [{**same[0], "options": ["the cows", "boris"]}])


def test_a_row_of_separate_sequences_has_the_same_posterior(own, monkeypatch):
    """Packed or not: the same factors, and so the same evidence and predictions."""
    packed = fit_tiny(own)
    rows = own_rows(4, 7)
    expected = predicted(own, rows)
    monkeypatch.setattr(outputs_module.OutputModel, "packs", lambda self, length: False)
    separate = fit_tiny(own, overwrite=True)
    assert separate.evidence.log_marginal_likelihood == pytest.approx(packed.evidence.log_marginal_likelihood, rel=1e-4)
    for record, other in zip(expected, predicted(own, rows), strict=True):
        assert other["probabilities"] == pytest.approx(record["probabilities"], abs=1e-4)


def test_gradient_checkpointing_and_resuming_give_the_same(own):
    plain = fit_tiny(own)
    recomputed = fit_tiny(own, model={"gradient_checkpointing": True}, overwrite=True)
    assert recomputed.evidence.log_marginal_likelihood == pytest.approx(
        plain.evidence.log_marginal_likelihood, rel=1e-5
    )


def test_other_engines_refuse_whole_answers(own):
    with pytest.raises(UsageError, match="--engine curvlinops has no scores of whole answers"):
        fit_tiny(own, engine="curvlinops")


def test_the_text_behind_the_answer_is_scored(tmp_path):
    make_adapter(tmp_path)
    use_task(tmp_path, doc_to_text="{{story}} ", doc_to_choice="{{options}}", doc_to_continuation="{{rest}}")
    rows = [{**row, "options": ["anna", "the cows"], "rest": "is loud ?"} for row in make_rows(8)]
    write(tmp_path, "train", rows)
    fit_tiny(tmp_path)
    (record,) = predicted(tmp_path, rows[:1])
    fitted = opened(tmp_path)
    network, tokenizer = fitted.model.outputs.network, fitted.model.loaded.tokenizer
    scores = []
    for option in ("anna", "the cows"):
        ids = tokenizer(f"{rows[0]['story']} {option} is loud ?")["input_ids"]
        log_p = torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), dim=1)
        scores.append(sum(log_p[place - 1, ids[place]] for place in range(len(ids) - 3, len(ids))))
    expected = torch.softmax(torch.stack(scores), dim=0).tolist()
    assert list(record["map_probabilities"].values()) == pytest.approx(expected, abs=1e-5)


assert set(" ".join(OPTIONS).split()) <= set(WORDS)
