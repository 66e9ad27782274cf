"""Token ids: what is cut when a row is too long, and what never is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, metaspace, with_chat_template, word_level, word_piece

from lapora.errors import DataError
from lapora.tasks import (
    EncodedExample,
    Example,
    Task,
    encode,
    encode_all,
    load_rows,
    load_task,
    render,
    render_all,
)

PASSAGE = "The quick brown fox jumps over the lazy dog, and the five boxing wizards jump quickly. " * 20
ROW = {"question": "is the sky blue", "passage": PASSAGE, "answer": True}
CAUSAL: list[Callable[..., Any]] = [byte_level, metaspace, word_level]


def boolq_prompt(passage: str, question: str = "is the sky blue") -> str:
    return f"Answer the question with only True or False: {question} Context: {passage}."


def example_of(row: dict[str, Any], kind: Any = "causal", task: Task | None = None) -> Example:
    return render(task or load_task("boolq"), row, kind=kind, index=7)


def encoded(row: dict[str, Any], tokenizer: Any, max_length: int, **options: Any) -> EncodedExample:
    return encode(example_of(row), tokenizer, kind="causal", max_length=max_length, **options)


@pytest.mark.parametrize("make", CAUSAL)
def test_a_short_prompt_is_the_tokenizers_own_ids(make: Callable[..., Any]) -> None:
    tokenizer = make(bos=True)
    row = {**ROW, "passage": "the sky is blue"}
    result = encoded(row, tokenizer, 300)
    assert result == EncodedExample(tokenizer(boolq_prompt("the sky is blue"))["input_ids"], None, False)
    assert result.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("make", CAUSAL)
def test_an_appended_end_mark_is_taken_off(make: Callable[..., Any]) -> None:
    tokenizer = make(bos=True, eos=True)
    whole = tokenizer(boolq_prompt("the sky is blue"))["input_ids"]
    assert whole[-1] == tokenizer.eos_token_id
    assert encoded({**ROW, "passage": "the sky is blue"}, tokenizer, 300).input_ids == whole[:-1]
    # One that the text itself holds stays.
    kept = encoded({**ROW, "passage": "the sky </s>"}, tokenizer, 300).input_ids
    assert kept == tokenizer(boolq_prompt("the sky </s>"))["input_ids"][:-1]


@pytest.mark.parametrize("make", CAUSAL)
@pytest.mark.parametrize("max_length", [60, 100, 137])
def test_the_passage_is_cut_from_its_end_and_the_cue_stays(make: Callable[..., Any], max_length: int) -> None:
    tokenizer = make(bos=True)
    result = encoded(ROW, tokenizer, max_length)
    assert result.truncated and max_length - 3 <= len(result.input_ids) <= max_length
    shorter = [cut for cut in range(len(PASSAGE)) if boolq_ids(tokenizer, PASSAGE[:cut]) == result.input_ids]
    assert shorter  # it is the prompt of a passage cut at its end, question and final mark in place
    assert tokenizer.decode(result.input_ids[-1:]).endswith(".")


def boolq_ids(tokenizer: Any, passage: str) -> list[int]:
    return tokenizer(boolq_prompt(passage))["input_ids"]


@settings(max_examples=40, deadline=None)
@given(passage=st.text(max_size=400), max_length=st.integers(90, 200), which=st.integers(0, 1))
def test_whatever_the_passage_it_fits_and_keeps_both_ends(passage: str, max_length: int, which: int) -> None:
    tokenizer = TOKENIZERS[which]
    result = encoded({**ROW, "passage": passage}, tokenizer, max_length)
    whole = boolq_ids(tokenizer, passage)
    assert len(result.input_ids) <= max_length
    assert result.truncated == (len(whole) > max_length)
    if not result.truncated:
        assert result.input_ids == whole
    assert result.input_ids[:10] == boolq_ids(tokenizer, "x")[:10]
    if which == 0:  # byte-level: the text can be read back
        decoded = tokenizer.decode(result.input_ids, skip_special_tokens=True)
        assert decoded.startswith(boolq_prompt("")[:-1]) and decoded.endswith(".")


TOKENIZERS = [byte_level(), metaspace()]


def test_a_row_that_cannot_be_cut_enough_is_named() -> None:
    tokenizer = byte_level()
    with pytest.raises(DataError) as caught:
        encoded({**ROW, "question": PASSAGE}, tokenizer, 60)
    count = len(tokenizer(boolq_prompt(PASSAGE, PASSAGE))["input_ids"])
    too_long = f"row 7: its prompt has {count} tokens, more than the maximum of 60"
    assert f"{too_long}, even without field 'passage'" in str(caught.value)
    no_field = Task.from_dict({"task": "x", "doc_to_text": "{{passage}} ?", "doc_to_choice": ["A", "B"]})
    with pytest.raises(DataError, match="set the task's truncate_field"):
        encode(example_of(ROW, task=no_field), tokenizer, kind="causal", max_length=60)
    numbers = Task.from_dict({**no_field.to_dict(), "truncate_field": "passage"})
    with pytest.raises(DataError, match="field 'passage' is not text"):
        row = {"passage": list(range(500))}
        encode(example_of(row, task=numbers), tokenizer, kind="causal", max_length=60)


@pytest.mark.parametrize("template", ["{{passage}} {{passage}} ?", "{{passage[:300]}} ?", "{{passage | upper}} ?"])
def test_a_template_that_does_something_with_the_field(template: str) -> None:
    task = Task.from_dict(
        {"task": "x", "doc_to_text": template, "doc_to_choice": ["A", "B"], "truncate_field": "passage"}
    )
    tokenizer = byte_level()
    result = encode(example_of(ROW, task=task), tokenizer, kind="causal", max_length=50)
    assert result.truncated and 10 < len(result.input_ids) <= 50
    assert tokenizer.decode(result.input_ids).endswith(" ?")


@pytest.mark.parametrize("make", CAUSAL)
@pytest.mark.parametrize("eos", [False, True])
def test_of_a_ready_prompt_the_end_is_kept(make: Callable[..., Any], eos: bool) -> None:
    tokenizer = make(bos=True, eos=eos)
    whole = tokenizer(PASSAGE + "Answer:")["input_ids"]
    whole = whole[:-1] if eos else whole
    result = encoded({"text": PASSAGE + "Answer:"}, tokenizer, 40)
    assert result.truncated and result.input_ids == [whole[0], *whole[-39:]]


def test_spaces_at_the_end_are_the_delimiter_where_there_is_none() -> None:
    tokenizer = byte_level()
    for delimiter, prompt in (("", "Which? Answer:"), (" ", "Which? Answer: ")):
        task = Task.from_dict(
            {
                "task": "x",
                "doc_to_text": "{{q}} Answer: ",
                "doc_to_choice": ["A", "B"],
                "target_delimiter": delimiter,
            }
        )
        result = encode(render(task, {"q": "Which?"}, kind="causal"), tokenizer, kind="causal", max_length=99)
        assert result.input_ids == tokenizer(prompt)["input_ids"]


def test_a_chat_template_wraps_and_its_end_survives_truncation() -> None:
    tokenizer = with_chat_template(byte_level(eos=True))
    cue = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    short = encoded({**ROW, "passage": "the sky"}, tokenizer, 300, chat_template=True)
    wrapped = f"<s><|im_start|>user\n{boolq_prompt('the sky')}<|im_end|>\n<|im_start|>assistant\n"
    assert short.input_ids == tokenizer(wrapped, add_special_tokens=False)["input_ids"]
    for row in (ROW, {"text": PASSAGE + "Answer:"}):
        long = encoded(row, tokenizer, 80, chat_template=True)
        assert long.truncated and 70 <= len(long.input_ids) <= 80
        assert long.input_ids[-len(cue) :] == cue and long.input_ids[0] == tokenizer.bos_token_id
    assert "Answer:<|im_end|>" in tokenizer.decode(long.input_ids)  # of a ready text, the end


def test_a_chat_template_that_is_not_there_or_raises() -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template; omit --chat-template"):
        encoded(ROW, byte_level(), 300, chat_template=True)
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('only assistants') }}"
    with pytest.raises(DataError, match="only assistants; omit --chat-template"):
        encoded(ROW, tokenizer, 300, chat_template=True)
    with pytest.raises(DataError, match="--chat-template is for causal models"):
        encode_all([], word_piece(), kind="classifier", max_length=9, chat_template=True)


def test_many_rows_are_encoded_as_each_alone(shared_data: Path) -> None:
    task = load_task("boolq")
    examples = render_all(task, load_rows(task, "validation", data_dir=shared_data / "boolq", limit=60), kind="causal")
    tokenizer = byte_level()
    together = encode_all(examples, tokenizer, kind="causal", max_length=300)
    alone = [encode(example, tokenizer, kind="causal", max_length=300) for example in examples]
    assert together == alone
    assert 0 < sum(row.truncated for row in together) < 60


def classified(row: dict[str, Any], max_length: int, task: Task | None = None) -> EncodedExample:
    task = task or load_task("boolq")
    return encode(example_of(row, "classifier", task), word_piece(), kind="classifier", max_length=max_length)


def test_a_classifier_reads_a_pair_with_segments() -> None:
    tokenizer = word_piece()
    result = classified({**ROW, "passage": "the sky is blue"}, 256)
    whole = tokenizer("is the sky blue", "the sky is blue")
    assert result == EncodedExample(whole["input_ids"], whole["token_type_ids"], False)
    assert set(result.token_type_ids or ()) == {0, 1}


def test_only_the_truncate_field_of_a_pair_is_cut() -> None:
    result = classified(ROW, 40)
    question = word_piece()("is the sky blue")["input_ids"]
    assert result.truncated and len(result.input_ids) == 40 == len(result.token_type_ids or ())
    assert result.input_ids[: len(question)] == question and result.input_ids[-1] == question[-1]
    first = Task.from_dict({**load_task("boolq").to_dict(), "truncate_field": "question"})
    long_question = {"question": PASSAGE, "passage": "the sky is blue"}
    passage = word_piece()("the sky is blue")["input_ids"][1:]
    assert classified(long_question, 40, first).input_ids[-len(passage) :] == passage
    with pytest.raises(DataError, match=r"row 7: it has \d+ tokens, more than the maximum of 40, and \d+ of them"):
        classified({"question": PASSAGE, "passage": "p"}, 40)


@pytest.mark.parametrize(
    "inputs",
    [
        ["context: {{passage}} question: {{question}}"],
        ["{{question}} {{question}} {{question}}", "context: {{passage}}"],
        ["{{passage}}", "{{question}} of {{passage}}"],
    ],
)
def test_only_the_truncate_field_is_cut_within_a_longer_text(inputs: list[str]) -> None:
    task = Task.from_dict({**load_task("boolq").to_dict(), "doc_to_inputs": inputs, "truncate_field": "passage"})
    result = classified(ROW, 40, task)
    assert result.truncated and 36 <= len(result.input_ids) <= 40
    assert len(result.token_type_ids or ()) == len(result.input_ids)
    kept = [
        count
        for count in range(len(PASSAGE))
        if word_piece()(
            *(text.replace("{{question}}", ROW["question"]).replace("{{passage}}", PASSAGE[:count]) for text in inputs)
        )["input_ids"]
        == result.input_ids
    ]
    assert kept  # it is the row with the beginning of the passage
    with pytest.raises(DataError, match="even without field 'passage'; fit with a larger --max-length"):
        classified({"question": PASSAGE, "passage": "p"}, 40, task)


def test_without_a_truncate_field_the_longest_is_cut() -> None:
    row = {"sentence1": PASSAGE, "sentence2": "the sky is blue"}
    result = classified(row, 40, load_task("rte"))
    end = word_piece()("the sky is blue")["input_ids"][1:]
    assert result.truncated and len(result.input_ids) == 40 and result.input_ids[-len(end) :] == end
    single = classified({"sentence": PASSAGE}, 20, load_task("cola"))
    assert single.truncated and len(single.input_ids) == 20
    assert single.input_ids == [*word_piece()(PASSAGE)["input_ids"][:19], result.input_ids[-1]]
    with pytest.raises(DataError, match="cannot be truncated; fit with a larger --max-length"):
        classified({"sentence": PASSAGE}, 2, load_task("cola"))


def test_ready_texts_and_pairs_keep_their_places() -> None:
    rows = [
        {"text": "the sky"},
        {**ROW, "passage": "the sky"},
        {"text": PASSAGE},
        {**ROW, "passage": "is blue"},
    ]
    examples = [example_of(row, "classifier") for row in rows]
    together = encode_all(examples, word_piece(), kind="classifier", max_length=30)
    assert together == [classified(row, 30) for row in rows]
    assert [row.truncated for row in together] == [False, False, True, False]
    assert encode_all([], word_piece(), kind="classifier", max_length=30) == []
    assert encode_all([], byte_level(), kind="causal", max_length=30) == []
