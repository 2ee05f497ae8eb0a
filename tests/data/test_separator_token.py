"""What follows from the tokenizer unless it is named: the token between documents, and the size of the vocabulary."""

import dataclasses

import pytest
import tokenizers

from nope_jax.cli import parse_train
from nope_jax.config import Config, DataConfig, ModelConfig, load, override, save
from nope_jax.data import load_corpus, load_tokenizer, prepare
from nope_jax.data.tokenizers import tokenizer_digest, with_vocab_size


@pytest.fixture
def folder(tmp_path):
    """The folder of a Hugging Face model, which names its end-of-text token; `plain.json` has no such token."""
    folder = tmp_path / "model"
    folder.mkdir()
    words = {word: 290 + i for i, word in enumerate(["[UNK]", "<|im_end|>", "<|endoftext|>", "one", "two"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    plain = {word: i for i, word in enumerate(["[UNK]", "<|im_end|>", "one"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(plain, unk_token="[UNK]")).save(str(tmp_path / "plain.json"))
    return folder


def test_the_token_between_documents_can_be_named(folder, tmp_path):
    for spec, named, own, other in [
        ("bytes", "\n", 0, 10),
        ("task:copy", " ", 0, 1),
        (str(folder), "<|im_end|>", 292, 291),
        (str(folder / "tokenizer.json"), "<|im_end|>", 292, 291),
        (str(tmp_path / "plain.json"), "<|im_end|>", None, 1),
    ]:
        tokenizer = load_tokenizer(spec, named)
        assert tokenizer.separator == tokenizer.bos == other
        assert tokenizer_digest(spec, named) != tokenizer_digest(spec)
        with pytest.raises(ValueError, match=f"data.separator_token 'no such' is no token of data.tokenizer {spec}"):
            load_tokenizer(spec, "no such")
        if own is None:
            with pytest.raises(ValueError, match="no token that separates documents, .* as data.separator_token"):
                load_tokenizer(spec)
        else:
            assert load_tokenizer(spec).separator == own


def test_rows_have_the_token_that_is_named_and_the_tokens_are_other_ones(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "one {"two " * i}"}}\n' for i in range(20)))
    config = DataConfig(f"jsonl:{tmp_path}/a.jsonl", dir=str(tmp_path / "data"), tokenizer=str(folder))
    corpora = [load_corpus(config, "train")]
    for separator, token in (("<|im_end|>", 291), ("<|endoftext|>", 292)):
        corpora.append(load_corpus(dataclasses.replace(config, separator_token=separator), "train"))
        assert set(corpora[-1].tokens[corpora[-1].offsets[1:] - 1].tolist()) == {token}
    assert corpora[0].digest() == corpora[2].digest() != corpora[1].digest()
    documents = prepare.find_documents(config, "train")
    files = {prepare.token_files(dataclasses.replace(config, separator_token=s), documents) for s in (None, "[UNK]")}
    assert len(files) == 2


def test_the_vocabulary_is_that_of_the_tokenizer_unless_it_is_given(folder, tmp_path, config_file):
    config = Config(data=DataConfig(tokenizer=str(folder)))
    assert config.model.vocab_size is None and with_vocab_size(config).model.vocab_size == 295
    save(with_vocab_size(config), tmp_path)
    assert load(tmp_path) == with_vocab_size(config)
    for vocab_size in (295, 384):
        assert with_vocab_size(override(config, {"model.vocab_size": vocab_size})).model.vocab_size == vocab_size
    # As many as before it followed: a run of then goes on.
    assert with_vocab_size(Config(data=DataConfig(tokenizer="task:copy"))).model.vocab_size == 256
    assert ModelConfig().num_tokens == with_vocab_size(Config()).model.vocab_size == 256
    given = ["--config", str(config_file), "--workdir", "w", "--data.tokenizer", str(folder)]
    assert with_vocab_size(parse_train(given).config).model.vocab_size == 295
    assert parse_train([*given, "--model.vocab_size", "300"]).config.model.vocab_size == 300
