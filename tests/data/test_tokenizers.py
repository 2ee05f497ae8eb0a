"""Tokenizers: what they read, how many bytes a token is, and that a text may be cut anywhere."""

import dataclasses
import itertools

import numpy as np
import pytest
import tokenizers

from nope_jax.config import DataConfig
from nope_jax.data import load_corpus, load_tokenizer
from nope_jax.data import tokenizers as text_tokenizers
from nope_jax.data.splits import is_validation
from nope_jax.data.tokenizers import JsonTokenizer
from tests.data.test_data import contents


def test_bytes(tmp_path):
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.separator, tokenizer.bos) == (256, 0, 0)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode(tokenizer.encode("naïve €")) == "naïve €"
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    (corpus,) = contents(load_corpus(DataConfig(source=f"text:{tmp_path}/binary"), "train"))
    assert corpus == (bytes(range(256)) * 10)[: len(corpus)]


def test_tokenizer_json(tokenizer_json):
    tokenizer = load_tokenizer(str(tokenizer_json))
    assert (tokenizer.separator, tokenizer.bos) == (0, 1)
    tokens = tokenizer.encode("the cat, naïve €")
    assert len(tokens) < len("the cat, naïve €".encode())
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == "the cat, naïve €"


UNEVEN = "the  cat sat\n on naïve € 😀 ﬁ x "


def test_bytes_of_text_by_token(tokenizer_json):
    tokenizer = load_tokenizer(str(tokenizer_json))
    for text in (UNEVEN, UNEVEN.encode(), "", "the cat"):
        size = len(text.encode() if isinstance(text, str) else text)
        for lengths in (tokenizer.byte_lengths(text), load_tokenizer("bytes").byte_lengths(text)):
            assert lengths.sum() == size and (lengths >= 0).all()
        assert len(tokenizer.byte_lengths(text)) == len(tokenizer.encode(text))
    assert (load_tokenizer("bytes").byte_lengths(UNEVEN) == 1).all()
    # Every token is some bytes here; one of those that share a character has it whole.
    spelled = [len(tokenizer.tokenizer.id_to_token(token)) for token in tokenizer.encode(UNEVEN).tolist()]
    assert np.abs(np.cumsum(spelled) - np.cumsum(tokenizer.byte_lengths(UNEVEN))).max() <= 3


def test_bytes_that_a_tokenizer_leaves_out_or_changes_are_counted(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "cat": 2}, unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.NFKC()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    assert tokenizer.byte_lengths(" cat  € ﬁn cat ").tolist() == [4, 5, 5, 5]


def test_tokens_are_kept_until_a_file_changes(tokenizer_json, texts, config, monkeypatch):
    config = dataclasses.replace(config, tokenizer=str(tokenizer_json))
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = load_corpus(config, "train")
    assert sorted(tokenizer.decode(corpus[i]).encode() for i in range(len(corpus))) == sorted(
        contents(load_corpus(dataclasses.replace(config, tokenizer="bytes"), "train"))
    )
    np.testing.assert_array_equal(corpus.tokens[corpus.offsets[1:] - 1], tokenizer.separator)

    with monkeypatch.context() as patch:
        patch.setattr(JsonTokenizer, "encode_pieces", lambda *_: pytest.fail("tokenised again"))
        again = load_corpus(config, "train")
    np.testing.assert_array_equal(again.tokens, corpus.tokens)
    assert again.lengths.tolist() == corpus.lengths.tolist()

    changed = next(path for path in texts.iterdir() if not is_validation(path.name))
    changed.write_text("the cat")
    corpus = load_corpus(config, "train")
    assert "the cat" in [tokenizer.decode(corpus[i]) for i in range(len(corpus))]


def test_a_byte_that_is_no_utf8_is_read_as_one_character_and_told_of(tokenizer_json, texts, config, capsys):
    (texts / "latin.txt").write_bytes("the cät sat".encode("latin-1"))
    config = dataclasses.replace(config, tokenizer=str(tokenizer_json))
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = load_corpus(config, "train")
    (index,) = (i for i in range(len(corpus)) if "sat" in tokenizer.decode(corpus[i]))
    assert tokenizer.decode(corpus[index]) == "the c\ufffdt sat"
    assert corpus.byte_lengths(index).sum() == 11 and len(corpus.byte_lengths(index)) == corpus.lengths[index]
    assert "1 documents are not UTF-8, " + str(texts / "latin.txt") in capsys.readouterr().err

    exact = load_corpus(dataclasses.replace(config, tokenizer="bytes"), "train")
    assert b"the c\xe4t sat" in contents(exact)


@pytest.fixture
def sentencepiece_model(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_prefix=str(tmp_path / "model"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return tmp_path / "model.model"


def words(seed, count):
    """Words of one to four bytes a character, between them blanks of all kinds, some in runs."""
    random = np.random.default_rng(seed)
    letters = [*"thecatsonm", "é", "€", "😀", "ﬁ", "1", ".", "'s", "e\u0301"]
    blanks = [" "] * 8 + ["\n", "  ", "\n\n", " \t", "\u3000", ". ", "\r\n"]
    return "".join("".join(random.choice(letters, random.integers(1, 7))) + random.choice(blanks) for _ in range(count))


def pieces_of(text, seed):
    """Cut anywhere, inside characters too."""
    cuts = [0, *sorted(np.random.default_rng(seed).integers(0, len(text), 40).tolist()), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


LLAMA_3 = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {
    "gpt2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True),  # a pattern that looks ahead
    "llama3": tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(LLAMA_3, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "metaspace": tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first"),
    "whole": None,
    "sentencepiece": "sentencepiece",
}


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS.values(), ids=PRE_TOKENIZERS)
def test_tokens_are_the_same_wherever_a_text_is_cut(pre_tokenizer, request, tmp_path, monkeypatch):
    monkeypatch.setattr(text_tokenizers, "BLOCK", 256)
    if pre_tokenizer == "sentencepiece":
        tokenizer = load_tokenizer(str(request.getfixturevalue("sentencepiece_model")))
        whole = tokenizer.processor.encode
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        if pre_tokenizer is None:  # as Llama 2 has it: merges of the whole text
            model.normalizer = tokenizers.normalizers.Prepend("▁")
        else:
            model.pre_tokenizer = pre_tokenizer
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if pre_tokenizer else sorted(set(words(0, 200)))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(words(0, 600).split("\n"), trainer)
        model.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))

        def whole(text):
            return model.encode(text, add_special_tokens=False).ids

    for seed in range(3):
        text = words(seed + 1, 1500)
        encoded = list(tokenizer.encode_pieces(pieces_of(text.encode(), seed)))
        assert len(encoded) > 10 and sum(piece.undecodable for piece in encoded) == 0
        assert np.concatenate([piece.tokens for piece in encoded]).tolist() == list(whole(text))
        byte_lengths = np.concatenate([piece.byte_lengths for piece in encoded])
        np.testing.assert_array_equal(byte_lengths, tokenizer.byte_lengths(text))
        assert byte_lengths.sum() == len(text.encode())


@pytest.mark.parametrize("text", [b"a" * 3000, b" " * 3000, b"\xff\xe9" * 1500, b"ab\xc3", b""])
def test_bytes_add_up_where_there_is_nothing_to_cut_at(text, tokenizer_json, sentencepiece_model, monkeypatch):
    monkeypatch.setattr(text_tokenizers, "BLOCK", 256)
    for path in tokenizer_json, sentencepiece_model:
        encoded = list(load_tokenizer(str(path)).encode_pieces(pieces_of(text or b"", 0) if text else []))
        byte_lengths = np.concatenate([piece.byte_lengths for piece in encoded])
        assert len(byte_lengths) == sum(len(piece.tokens) for piece in encoded)
        assert (byte_lengths >= 0).all() and byte_lengths.sum() == (len(text) if len(byte_lengths) else 0)
        undecodable = len(text) - len(text.decode(errors="ignore"))
        assert sum(piece.undecodable for piece in encoded) == undecodable


def test_sentencepiece(sentencepiece_model):
    tokenizer = load_tokenizer(str(sentencepiece_model))
    tokens = tokenizer.encode(b"the cat sat")
    assert tokenizer.decode(tokens) == "the cat sat"
    for text in (UNEVEN, UNEVEN.encode(), ""):
        byte_lengths = tokenizer.byte_lengths(text)
        assert len(byte_lengths) == len(tokenizer.encode(text)) and (byte_lengths >= 0).all()
        assert byte_lengths.sum() == len(UNEVEN.encode() if text else "")
    assert tokenizer.separator == 2 not in tokens and tokenizer.bos == 1 not in tokens
    assert tokens.max() < tokenizer.vocab_size


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("absent.json", None, "data.tokenizer must be bytes, task:NAME or the path of .*absent.json is no file"),
        ("bad.json", "{}", "bad.json is not a tokenizer.json"),
        ("bad.model", "{}", "bad.model is neither a SentencePiece model nor a .json file"),
        (
            "plain.json",
            tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str(),
            "plain.json has no token that separates documents",
        ),
    ],
)
def test_tokenizers_that_are_none(name, content, complaint, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load_tokenizer(str(tmp_path / name))
