"""Tiny tokenizers of each kind, trained on a few sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Select one of the choices that answers the following question: which is it? Choices: A. dry. Answer: A",
    "Answer the question with only True or False: is the sky blue Context: the sky is blue. True",
    "Answer the question with only True or False: is the sky green Context: the sky is blue. False",
    "Answer: A Answer: B Answer: C Answer: D True False True False entailment not A B C D E",
    "the quick brown fox jumps over the lazy dog. The five boxing wizards jump quickly? yes! no:",
] * 4
ANSWERS = ["A", "B", "C", "D", "True", "False"]


def byte_level(*, bos: bool = True, eos: bool = False, **kwargs: Any) -> PreTrainedTokenizerFast:
    """As GPT-2 and Llama 3: byte-level BPE, a space belongs to the word behind it."""
    return _framed(Tokenizer.from_str(_byte_level_core()), bos, eos, **kwargs)


# Training breaks ties at random: train once, and give every test its own copy.
@cache
def _byte_level_core() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def metaspace(*, bos: bool = True, eos: bool = False, **kwargs: Any) -> PreTrainedTokenizerFast:
    """As Llama 2: SentencePiece BPE without pre-tokenisation at words, a mark in place of each space."""
    return _framed(Tokenizer.from_str(_metaspace_core()), bos, eos, unk_token="<unk>", **kwargs)


@cache
def _metaspace_core() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        show_progress=False,
        max_token_length=8,
    )
    words = [word for text in CORPUS for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer.to_str()


def word_level(*, bos: bool = False, eos: bool = False, **kwargs: Any) -> PreTrainedTokenizerFast:
    """Whole words and single marks."""
    pieces = pre_tokenizers.Whitespace()
    words = sorted({word for text in CORPUS for word, _ in pieces.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pieces
    return _framed(tokenizer, bos, eos, unk_token="<unk>", **kwargs)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: [CLS] text [SEP] text [SEP], with segment ids."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_word_piece_core()),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@cache
def _word_piece_core() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")],
    )
    return tokenizer.to_str()


def with_chat_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A chat template of the ChatML form, its marks being tokens of their own."""
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>"), AddedToken("<|im_end|>")]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _framed(tokenizer: Tokenizer, bos: bool, eos: bool, **kwargs: Any) -> PreTrainedTokenizerFast:
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + " $B:1",
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **kwargs
    )
