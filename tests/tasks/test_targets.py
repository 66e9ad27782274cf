"""Numbers, sets of labels and pairs of texts as labels, and bad input of each."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pandas
import pytest

from lapora.errors import DataError
from lapora.tasks import Task, given_rows, render, render_all
from lapora.tasks.preferences import token_ids
from lapora.tasks.targets import labels_of, numbers_of
from lapora.tasks.tokens import encode


def task(likelihood: str, **keys: Any) -> Task:
    base: dict[str, Any] = {"task": "t", "likelihood": likelihood}
    if likelihood != "preference":
        base |= {"doc_to_inputs": "{{a}}", "doc_to_target": "{{y}}"}
    return Task.from_dict({**base, **keys})


@pytest.mark.parametrize(("value", "number"), [(3, 3.0), (-1, -1.0), ("2.5", 2.5), (0.0, 0.0), ([4.0], 4.0)])
def test_a_number_is_a_target(value, number):
    example = render(task("gaussian"), {"a": "x", "y": value}, kind="classifier")
    assert example.target == (number,) and example.choices == ("value",)


@pytest.mark.parametrize("value", [None, ""])
def test_no_number_is_no_label(value):
    assert render(task("gaussian"), {"a": "x", "y": value}, kind="classifier").target is None
    with pytest.raises(DataError, match="no label"):
        render(task("gaussian"), {"a": "x", "y": value}, kind="classifier", labels="required")


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan"])
def test_a_target_that_is_not_finite_is_refused(value):
    with pytest.raises(DataError, match=r"row 0: target .* is not finite"):
        render(task("gaussian"), {"a": "x", "y": value}, kind="classifier")


@pytest.mark.parametrize("value", ["good", True, {"b": 1}, [[1]]])
def test_a_target_that_is_not_a_number_is_refused(value):
    with pytest.raises(DataError, match=r"row 0: target .* is not a number"):
        render(task("gaussian"), {"a": "x", "y": value}, kind="classifier")


def test_several_outputs_have_a_number_each():
    assert numbers_of([1, "2"], ("p", "q"), "row 3") == (1.0, 2.0)
    assert numbers_of({"q": 2, "p": 1}, ("p", "q"), "row 3") == (1.0, 2.0)
    with pytest.raises(DataError, match="row 3: 1 targets, not 2"):
        numbers_of(1.0, ("p", "q"), "row 3")
    with pytest.raises(DataError, match="is not a number"):
        numbers_of({"p": 1}, ("p", "q"), "row 3")


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ([1, 0, 1], (1.0, 0.0, 1.0)),
        ([True, False, False], (1.0, 0.0, 0.0)),
        (["c", "a"], (1.0, 0.0, 1.0)),
        ([], (0.0, 0.0, 0.0)),
        ([2], (0.0, 0.0, 1.0)),
        ([0, 2], (1.0, 0.0, 1.0)),
        ({"b": 1}, (0.0, 1.0, 0.0)),
        (None, None),
    ],
)
def test_labels_are_values_names_or_indices(value, labels):
    assert labels_of(value, ("a", "b", "c"), "row 0") == labels


@pytest.mark.parametrize("value", [[0, 2, 1], [0.5, 0, 1], {"a": 2}])
def test_labels_outside_zero_and_one_are_refused(value):
    with pytest.raises(DataError, match=r"row 0: label value .* is not 0 or 1"):
        labels_of(value, ("a", "b", "c"), "row 0")


@pytest.mark.parametrize("value", [["d"], [3], [-1], {"d": 1}])
def test_unknown_labels_are_refused(value):
    with pytest.raises(DataError, match="row 0: unknown label"):
        labels_of(value, ("a", "b", "c"), "row 0")
    with pytest.raises(DataError, match="are not a list"):
        labels_of("a", ("a", "b", "c"), "row 0")


def test_a_bernoulli_label_is_one_of_two_answers():
    two = task("bernoulli", doc_to_choice=["no", "yes"])
    targets = [render(two, {"a": "x", "y": value}, kind="classifier").target for value in (0, 1, "yes")]
    assert targets == [0, 1, 1]
    for value in (2, 0.5):
        with pytest.raises(DataError, match="unknown label"):
            render(two, {"a": "x", "y": value}, kind="classifier")


@pytest.mark.parametrize(
    ("likelihood", "keys", "message"),
    [
        ("poisson", {}, "must be one of categorical, preference"),
        ("gaussian", {"doc_to_text": "{{a}}"}, "is for sequence classifiers"),
        ("gaussian", {"metric": "mcc"}, "metric mcc goes with likelihood categorical"),
        ("bernoulli", {"doc_to_choice": ["a", "b", "c"]}, "has two answers, not 3"),
        ("bernoulli", {}, "missing doc_to_choice|has two answers"),
        ("multilabel", {"doc_to_choice": ["a"]}, "has several labels"),
        ("multilabel", {"doc_to_choice": "{{ names }}"}, "needs a list, not a template"),
        ("categorical", {"doc_to_choice": ["a"]}, "at least two answers"),
        ("preference", {"doc_to_choice": ["a", "b"]}, "has the answers first and second"),
        ("preference", {"doc_to_inputs": "{{a}}"}, "compares two texts"),
        ("preference", {"doc_to_target": "{{y}}"}, "the first text is the better one"),
    ],
)
def test_keys_that_contradict_the_likelihood_are_refused(likelihood, keys, message):
    with pytest.raises(DataError, match=message):
        task(likelihood, **keys)


@pytest.mark.parametrize("likelihood", ["gaussian", "preference"])
def test_a_task_survives_the_manifest(likelihood):
    first = task(likelihood)
    assert Task.from_dict(first.to_dict()) == first and first.to_dict()["likelihood"] == likelihood
    assert "likelihood" not in task("categorical", doc_to_choice=["a", "b"]).to_dict()


PAIR = {"chosen": "good text", "rejected": "bad text"}


def test_a_pair_has_two_texts_and_its_first_is_better():
    example = render(task("preference"), PAIR, kind="classifier")
    assert example.inputs == ("good text", "bad text") and example.target == 0
    assert example.choices == ("first", "second") and not example.messages
    with_prompt = render(task("preference"), {**PAIR, "prompt": "Say: "}, kind="classifier")
    assert with_prompt.inputs == ("Say: good text", "Say: bad text")
    rendered = task("preference", doc_to_inputs=["Q {{q}} A {{x}}", "Q {{q}} A {{y}}"])
    assert render(rendered, {"q": 1, "x": 2, "y": 3}, kind="classifier").inputs == ("Q 1 A 2", "Q 1 A 3")


def test_one_text_is_for_prediction_alone():
    example = render(task("preference"), {"text": "one", "prompt": "p "}, kind="classifier", labels="ignore")
    assert example.inputs == ("p one",) and example.target is None
    with pytest.raises(DataError, match="fitted and scored on pairs"):
        render(task("preference"), {"text": "one"}, kind="classifier")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "same", "rejected": "same"}, "the two texts are equal"),
        ({"chosen": "x"}, "no value for rejected"),
        ({"chosen": "x", "rejected": 3}, "must all be texts, or all be lists of chat messages"),
        ({"chosen": "x", "rejected": [{"role": "user", "content": "y"}]}, "must all be texts"),
        ({"chosen": [{"role": "user"}], "rejected": [{"role": "user", "content": "y"}]}, "not a chat message"),
        ({"chosen": " ", "rejected": ""}, "the rendered text is empty"),
        ({"chosen": "\ud800", "rejected": "x"}, "unpaired surrogate"),
    ],
)
def test_bad_pairs_are_refused(row, message):
    with pytest.raises(DataError, match=f"row 0: .*{message}|row 0: {message}"):
        render_all(task("preference"), [row], kind="classifier")


class Words:
    """One token a word; remembers how it was called."""

    eos_token = "</s>"
    chat_template = "yes"

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, Any]:
        self.text, self.special = text, add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages)


def test_texts_are_encoded_as_trl_does():
    words = Words()
    token_ids(task("preference"), "a b", words, messages=False, where="row 0")
    assert (words.text, words.special) == ("a b</s>", True)
    token_ids(task("preference"), "a b</s>", words, messages=False, where="row 0")
    assert words.text == "a b</s>"
    token_ids(task("preference", doc_to_inputs=["{{x}}", "{{y}}"]), "a b", words, messages=False, where="row 0")
    assert words.text == "a b"
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    example = render(task("preference"), row, kind="classifier")
    encoded = encode(example, words, kind="classifier", max_length=9)
    assert len(encoded.input_ids) == len(encoded.second.input_ids) == 4 and not words.special
    assert words.text == "<user> hi <assistant> hello"
    words.chat_template = ""
    with pytest.raises(DataError, match="no chat template"):
        encode(example, words, kind="classifier", max_length=9)


def test_a_pair_that_is_too_long_is_refused():
    example = render(task("preference"), {"chosen": "a b c d", "rejected": "a"}, kind="classifier")
    with pytest.raises(DataError, match="row 0: a text has 4 tokens, more than the maximum of 3"):
        encode(example, Words(), kind="classifier", max_length=3)


def test_arrays_of_a_data_frame_are_lists() -> None:
    """``pandas.read_parquet`` returns a column of lists as arrays."""
    frame = pandas.DataFrame({"text": ["a", "b"], "labels": [numpy.array([1, 0]), numpy.array([0, 1])]})
    task = Task.from_dict(
        {
            "task": "t",
            "likelihood": "multilabel",
            "doc_to_inputs": ["{{text}}"],
            "doc_to_choice": ["x", "y"],
            "doc_to_target": "labels",
        }
    )
    rows = list(given_rows(frame, texts=False))
    assert [row.target for row in render_all(task, rows, kind="classifier")] == [(1.0, 0.0), (0.0, 1.0)]
    (row,) = given_rows({"label": numpy.int64(1), "right": numpy.bool_(True), "x": [numpy.float64(0.5)]}, texts=False)
    assert row == {"label": 1, "right": True, "x": [0.5]} and all(
        type(row[key]) is kind for key, kind in {"label": int, "right": bool, "x": list}.items()
    )
