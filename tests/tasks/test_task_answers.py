"""Answer tokens: found by taking the difference, refused by name where they are not distinct and single."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import byte_level, metaspace, with_chat_template, word_level

from lapora.errors import DataError
from lapora.tasks import (
    Task,
    answer_token_ids,
    check_task,
    describe_task,
    load_rows,
    load_task,
    render,
    render_all,
)

PROMPTS = ["which is it? Answer:", "is it blue Answer:"]
KINDS: list[tuple[Callable[..., Any], str]] = [(byte_level, "Ġ"), (metaspace, "▁"), (word_level, "")]


def tokens(tokenizer: Any, choices: list[str], prompts: list[str] = PROMPTS, **options: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(answer_token_ids(tokenizer, prompts, choices, **options))


@pytest.mark.parametrize(("make", "space"), KINDS)
@pytest.mark.parametrize("frame", [{"bos": True}, {"bos": False}, {"bos": True, "eos": True}])
def test_each_kind_of_tokenizer(make: Callable[..., Any], space: str, frame: dict[str, bool]) -> None:
    tokenizer = make(**frame)
    assert tokens(tokenizer, ["A", "B", "C", "D"]) == [space + letter for letter in "ABCD"]
    truths = tokens(tokenizer, ["False", "True"], ["the sky is blue.", "the sky is (not)."])
    assert truths == [space + "False", space + "True"]


@pytest.mark.parametrize(("make", "space"), KINDS)
def test_the_delimiter_decides_which_token(make: Callable[..., Any], space: str) -> None:
    tokenizer = make(bos=True)
    assert tokens(tokenizer, ["A", "B"], ["Answer:\n"], delimiter="") == ["A", "B"]
    # Without a delimiter the prompt's own last space is one, as in the harness.
    assert tokens(tokenizer, ["A", "B"], ["Answer: "], delimiter="") == [space + "A", space + "B"]


def test_the_ids_are_what_follows_the_encoded_prompt() -> None:
    """What a model is trained on, prompt and answer in one text, goes on after the prompt with this id."""
    tokenizer = byte_level()
    for prompt in PROMPTS:
        before = tokenizer(prompt)["input_ids"]
        for choice, token in zip("AB", answer_token_ids(tokenizer, PROMPTS, ["A", "B"]), strict=True):
            assert tokenizer(f"{prompt} {choice}")["input_ids"] == [*before, token]


@pytest.mark.parametrize(("make", "space"), KINDS)
def test_an_answer_of_several_tokens_is_refused_by_name(make: Callable[..., Any], space: str) -> None:
    with pytest.raises(DataError, match=r"answer 'not entailment' is [23] tokens in this tokenizer, not one"):
        tokens(make(), ["A", "not entailment"])


def test_answers_that_cannot_be_told_apart_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="answer 'zebra' is not in the tokenizer's vocabulary"):
        tokens(word_level(), ["A", "zebra"])
    lower = byte_level()
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match=r"answers 'The' and 'the' have the same token \(\d+\)"):
        tokens(lower, ["The", "the"])


def test_a_merge_across_the_boundary_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="answer 'A' merges with the end of the prompt"):
        tokens(word_level(), ["A", "B"], ["Answer"], delimiter="")
    with pytest.raises(DataError, match="answer 'lse' merges with the end of the prompt"):
        tokens(byte_level(), ["lse", "A"], ["it is Fa"], delimiter="")


def test_prompts_that_disagree_are_refused_by_name() -> None:
    # Behind a letter "A" is a token with its space; behind a line's end there is no space.
    prompts = ["Answer: ", "Answer: ", "Answer:\n"]
    with pytest.raises(DataError) as caught:
        tokens(byte_level(), ["A", "B"], prompts, delimiter="", labels=["row 4", "row 5", "row 9"])
    assert str(caught.value).startswith("row 9: answer 'A' is token ") and "'Answer:'" in str(caught.value)
    with pytest.raises(DataError, match="prompt 1: answer 'A' is merged with the end of the prompt"):
        tokens(word_level(), ["A", "B"], ["Answer:", "Answer"], delimiter="")


def test_no_prompt_at_all() -> None:
    with pytest.raises(DataError, match="finding the answers' tokens requires a prompt"):
        tokens(byte_level(), ["A", "B"], [])


def test_behind_a_chat_template_there_is_no_delimiter() -> None:
    tokenizer = with_chat_template(byte_level(eos=True))
    assert tokens(tokenizer, ["A", "B"], chat_template=True) == ["A", "B"]
    with pytest.raises(DataError, match="no chat template"):
        tokens(byte_level(), ["A", "B"], chat_template=True)


def test_thousands_of_real_prompts(shared_data: Path) -> None:
    task = load_task("boolq")
    examples = render_all(task, load_rows(task, "train", data_dir=shared_data / "boolq"), kind="causal")
    found = tokens(byte_level(), ["False", "True"], [example.text or "" for example in examples])
    assert found == ["ĠFalse", "ĠTrue"]


def test_check_says_what_comes_of_a_task(shared_data: Path) -> None:
    task = load_task("boolq")
    rows = load_rows(task, "train", data_dir=shared_data / "boolq", limit=50)
    report = check_task(task, rows, kind="causal", tokenizer=byte_level(), n=2, max_length=250)
    assert report["rows"] == 50 and sum(report["labels"].values()) == 50 and report["unlabelled"] == 0
    assert report["labels"]["True"] == sum(row.values["answer"] for row in rows)
    assert [shown["index"] for shown in report["examples"]] == [0, 1]
    assert report["examples"][0]["text"].startswith("Answer the question with only True or False: does ethanol")
    assert {choice: held["token"] for choice, held in report["answer_tokens"].items()} == {
        "False": "ĠFalse",
        "True": "ĠTrue",
    }
    assert report["max_length"] == 250 and 0 < report["truncated"] < 50 and 248 <= report["longest"] <= 250
    bare = check_task(task, rows, kind="causal")
    assert "answer_tokens" not in bare and bare["max_length"] == 300


def test_check_shows_prompts_in_the_chat_template() -> None:
    task = Task.from_dict({"task": "t", "doc_to_text": "{{q}}", "doc_to_choice": ["A", "B"], "doc_to_target": 0})
    tokenizer = with_chat_template(byte_level(eos=True))
    report = check_task(task, [{"q": "is it"}], kind="causal", tokenizer=tokenizer, chat_template=True)  # type: ignore
    messages = [{"role": "user", "content": "is it"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert report["examples"][0]["text"].rstrip() == expected.rstrip() != "is it"


def test_check_counts_rows_without_labels(shared_data: Path) -> None:
    task = Task.from_dict({**load_task("rte").to_dict()})
    rows = [render(task, {"sentence1": "a", "sentence2": "b", "label": -1}, kind="classifier").row]
    report = check_task(task, rows, kind="classifier")  # type: ignore[arg-type]
    assert report["unlabelled"] == 1 and report["labels"] == {"entailment": 0, "not_entailment": 0}
    assert report["examples"][0] == {"index": 0, "inputs": ["a", "b"], "target": None}


def test_describe() -> None:
    assert describe_task(load_task("cola")) == {
        "task": "cola",
        "kinds": ["classifier"],
        "choices": ["unacceptable", "acceptable"],
        "metric": "mcc",
        "hub": "nyu-mll/glue/cola",
        "splits": {"train": "train", "validation": "validation", "test": "test"},
    }
    assert describe_task(load_task("boolq"))["kinds"] == ["causal", "classifier"]
