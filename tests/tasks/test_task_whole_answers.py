"""Answers of several tokens: encoded as the harness does, refused by name where they cannot be scored."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers_for_tests import byte_level, metaspace, with_chat_template, word_level

from lapora.errors import DataError
from lapora.tasks import (
    EncodedExample,
    Row,
    Task,
    check_task,
    encode,
    encode_all,
    render,
    render_all,
    resolve_answers,
    resolve_choices,
)

QUESTION = {
    "task": "own",
    "doc_to_text": "{{question}} Answer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{label}}",
    "max_length": 60,
}
ROW = {"question": "which is it?", "options": ["the lazy dog", "False", "jump quickly"], "label": 1}


def task(**keys: Any) -> Task:
    return Task.from_dict({**QUESTION, **keys})


def encoded(row: dict[str, Any], tokenizer: Any, max_length: int = 60, *, of: Task | None = None, **how: Any):
    of = of or task()
    example = render(of, row, kind="causal", choices=())
    return encode(example, tokenizer, kind="causal", max_length=max_length, answer_score=of.answer_score, **how)


def harness_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The rule of the harness, written down once more."""
    if not context.strip():
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        return [tokenizer.bos_token_id], ids
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    before = tokenizer(context)["input_ids"]
    return before, tokenizer(context + continuation)["input_ids"][len(before) :]


def sequences(found: EncodedExample) -> list[tuple[list[int], int]]:
    return [([*found.input_ids, *answer.ids], answer.scored) for answer in found.answers]


@pytest.mark.parametrize("make", [byte_level, metaspace, word_level])
@pytest.mark.parametrize("end", [" Answer:", " Answer: ", " Answer:\n", ": Fa"])
@pytest.mark.parametrize("delimiter", [" ", "", "\n"])
def test_prompt_and_answers_are_cut_as_in_the_harness(make: Any, end: str, delimiter: str) -> None:
    tokenizer = make()
    of = task(doc_to_text="{{question}}" + end, target_delimiter=delimiter)
    if make is word_level and end == ": Fa":
        pytest.skip("a word that this tokenizer does not know")
    row = {**ROW, "options": ["lse it", "the lazy dog", "A"]} if make is not word_level else ROW
    found = encoded(row, tokenizer, of=of)
    for (ids, scored), choice in zip(sequences(found), row["options"], strict=True):
        before, after = harness_pair(tokenizer, row["question"] + end, delimiter + choice)
        assert (ids, scored) == (before + after, len(after))
    assert all(answer.weight == 1.0 for answer in found.answers)


def test_a_merge_with_the_prompt_is_cut_at_its_length_and_counted() -> None:
    tokenizer = byte_level()
    of = task(doc_to_text="{{question}} Fa", target_delimiter="")
    found = encoded({**ROW, "options": ["lse it", " dog"]}, tokenizer, of=of)
    assert [answer.merged for answer in found.answers] == [True, False]
    report = check_task(
        of, [Row(0, {**ROW, "options": ["lse it", " dog"], "label": 0})], kind="causal", tokenizer=tokenizer
    )
    assert report["merged"] == 1
    with pytest.raises(DataError, match="row 0: answer 'lse' has no tokens of its own behind the prompt"):
        encoded({**ROW, "options": ["lse", " dog"]}, tokenizer, of=of)


def test_scores_are_weighted_by_tokens_or_bytes() -> None:
    tokenizer = byte_level()
    row = {**ROW, "options": ["the läzy dog", "A"]}
    tokens = [answer.scored for answer in encoded(row, tokenizer).answers]
    per_token = encoded(row, tokenizer, of=task(answer_score="per_token")).answers
    per_byte = encoded(row, tokenizer, of=task(answer_score="per_byte")).answers
    assert [answer.weight for answer in per_token] == [1 / count for count in tokens]
    assert [answer.weight for answer in per_byte] == [1 / 13, 1.0]
    with pytest.raises(DataError, match="answer_score: must be one of sum, per_token, per_byte, not 'mean'"):
        task(answer_score="mean")


def test_an_empty_prompt_is_the_token_of_the_beginning() -> None:
    tokenizer = byte_level()
    found = encoded(ROW, tokenizer, of=task(doc_to_text=""))
    assert found.input_ids == [tokenizer.bos_token_id]
    for (ids, _), choice in zip(sequences(found), ROW["options"], strict=True):
        assert ids == [tokenizer.bos_token_id, *tokenizer(" " + choice, add_special_tokens=False)["input_ids"]]
    tokenizer.bos_token = None
    assert encoded(ROW, tokenizer, of=task(doc_to_text="")).input_ids == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="row 0: its prompt is empty, and the tokenizer has no token of the beginning"):
        encoded(ROW, tokenizer, of=task(doc_to_text=""))


def test_a_continuation_is_scored_behind_each_answer() -> None:
    tokenizer = byte_level()
    of = task(doc_to_text="{{question}} ", doc_to_continuation="{{rest}}", target_delimiter=" ")
    row = {**ROW, "options": ["the dog", "the fox"], "rest": "jumps over"}
    found = encoded(row, tokenizer, of=of)
    for (ids, scored), choice in zip(sequences(found), row["options"], strict=True):
        before, after = harness_pair(tokenizer, "which is it? " + choice, " jumps over")
        assert (ids, scored) == (before + after, len(after))
    assert found.input_ids == tokenizer("which is it? the")["input_ids"]  # the tokens that both begin with
    assert resolve_answers(tokenizer, of, [render(of, row, kind="causal")], ("a", "b")).answer_score == "sum"


def test_a_chat_template_wraps_the_prompt() -> None:
    tokenizer = with_chat_template(byte_level(eos=True))
    found = encoded(ROW, tokenizer, chat_template=True)
    text = tokenizer.decode([*found.input_ids, *found.answers[0].ids])
    assert text.endswith("<|im_start|>assistant\nthe lazy dog")


def test_answers_that_cannot_be_scored_are_refused_by_name() -> None:
    from tokenizers import normalizers

    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="row 0: answers 'The dog' and 'the dog' have the same tokens"):
        encoded({**ROW, "options": ["The dog", "the dog"]}, lower)
    gone = byte_level()
    gone.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match="row 0: answer ' ' has no tokens of its own"):
        encoded({**ROW, "options": ["the dog", " "]}, gone)
    with pytest.raises(DataError, match="row 0: answer 'a zebra' has text that is not in the tokenizer's vocabulary"):
        encoded({**ROW, "options": ["the dog", "a zebra"]}, word_level())
    for options, count in (([], 0), (["the dog"], 1)):
        with pytest.raises(DataError, match=f"row 0: doc_to_choice: at least two answers are required, not {count}"):
            encoded({**ROW, "options": options}, byte_level())


def test_a_prefix_of_another_answer_is_an_answer() -> None:
    found = encoded({**ROW, "options": ["the", "the dog", "the dog jumps"]}, byte_level())
    assert [answer.scored for answer in found.answers] == [1, 2, 3]


def test_the_maximum_length_cuts_the_prompt_and_never_an_answer() -> None:
    tokenizer = byte_level()
    long = {**ROW, "question": "the quick brown fox jumps over the lazy dog. " * 4}
    of = task(truncate_field="question")
    whole = encoded(long, tokenizer, 500, of=of)
    short = encoded(long, tokenizer, 20, of=of)
    assert not whole.truncated and short.truncated
    assert 17 <= len(short) <= 20 and short.answers == whole.answers
    with pytest.raises(
        DataError, match=r"row 0: its prompt and longest answer have \d+ tokens, more than the maximum of 20"
    ):
        encoded(long, tokenizer, 20)
    with pytest.raises(
        DataError, match=r"answer 'the lazy dog' has 3 tokens, which leaves no room for the prompt in the maximum of 2"
    ):
        encoded(ROW, tokenizer, 2, of=of)
    given = render(of, {"prompt": long["question"] + "Answer:", "answers": ["the dog", "A"]}, kind="causal")
    cut = encode(given, tokenizer, kind="causal", max_length=20)
    assert cut.truncated and len(cut) == 20 and cut.input_ids[-1] == whole.input_ids[-1]


def test_rows_of_unlike_numbers_of_answers_and_labels() -> None:
    of, tokenizer = task(), byte_level()
    rows = [Row(0, ROW), Row(1, {**ROW, "options": ["A", "B"], "label": 0})]
    assert resolve_choices(of, rows, kind="causal") == ()
    with pytest.raises(DataError, match="row 1: its answers are A, B, not the lazy dog"):
        resolve_choices(of, rows)
    examples = render_all(of, rows, kind="causal", choices=())
    assert [
        len(row.answers) for row in encode_all(examples, tokenizer, kind="causal", max_length=60, answer_score="sum")
    ] == [3, 2]
    report = check_task(of, rows, kind="causal", tokenizer=tokenizer)
    assert report["labels"] == {"0": 1, "1": 1, "2": 0}
    assert report["whole_answers"] == "whole answers are scored: the rows have answers of their own"
    assert report["answer_score"] == "sum" and report["examples"][0]["answers"] == ROW["options"]
    assert report["answer_tokens"]["the lazy dog"]["tokens"] == ["Ġthe", "Ġlazy", "Ġdog"]


def test_single_tokens_stay_single_and_others_say_why() -> None:
    tokenizer = byte_level()
    of = task(doc_to_choice=["False", "True"])
    example = render(of, ROW, kind="causal")
    assert resolve_answers(tokenizer, of, [example], ("False", "True")).token_ids is not None
    several = resolve_answers(tokenizer, of, [example], ("False", "not entailment"))
    assert several.token_ids is None and several.answer_score == "sum"
    assert "answer 'not entailment' is" in several.note
    per_byte = task(doc_to_choice=["False", "True"], answer_score="per_byte")
    assert resolve_answers(tokenizer, per_byte, [example], ("False", "True")).answer_score == "per_byte"


def test_a_prompt_with_answers_needs_no_field_of_the_task() -> None:
    example = render(
        task(), {"prompt": "which?", "answers": ["the dog", "A", 3], "id": 7}, kind="causal", choices=("x", "y")
    )
    assert example.given and example.text == "which?" and example.choices == ("the dog", "A", "3") and example.id == 7
    for row, message in (
        ({"prompt": 3, "answers": ["a", "b"]}, "row 0: its prompt is a number, not text"),
        ({"prompt": "a", "answers": "b"}, "row 0: its answers are text, not a list of texts"),
        ({"prompt": "a", "answers": ["b"]}, "row 0: answers: at least two answers are required, not 1"),
        ({"prompt": "a", "answers": ["b", "b"]}, "row 0: answers: duplicate answer 'b'"),
        ({"prompt": "a", "answers": ["b", "c"], "other": 1}, "row 0: no value for question"),
    ):
        with pytest.raises(DataError, match=message):
            render(task(), row, kind="causal")
