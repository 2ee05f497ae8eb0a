"""The tokenizer inside a GGUF file, turned into one of the tokenizers library.

GGUF keeps a vocabulary, merges or scores, and the name of a pre-tokenizer, whose meaning is defined by llama.cpp
(src/llama-vocab.cpp). A name that is not in PRE_TOKENIZERS is refused, because a near one would give other tokens.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nope_jax.data.gguf import GGUFHeader

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_AND_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _REST_AND_SLASH
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _REST_AND_SLASH
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), (_QWEN2,)),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (_BLOOM,)),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""By llama.cpp's name: patterns that split the text, one after the other, into what they match and what is between."""

_IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "tekken"}
"""A word that is in the vocabulary is a token, whatever the merges say."""

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


def build_tokenizer(header: GGUFHeader) -> tuple[Tokenizer, int | None, int | None]:
    """Build the tokenizer of a GGUF file.

    Returns:
        The tokenizer, and the ids of its end-of-sequence and beginning-of-sequence tokens, None if it has none.

    Raises:
        ValueError: the file has no tokenizer, or one of a kind or with a pre-tokenizer that is not supported.
    """
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in header.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = own.get("model")
    if kind not in builders or "tokens" not in own:
        raise ValueError(
            f"{header.path}: a tokenizer of kind {kind!r} is not supported, only {' and '.join(builders)}"
            if kind
            else f"{header.path} has no tokenizer"
        )
    tokenizer = builders[kind](own, header)
    types = own.get("token_type", [])
    special = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(own["tokens"], types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(special)
    return tokenizer, own.get("eos_token_id"), own.get("bos_token_id")


def adds_bos(header: GGUFHeader) -> bool:
    """Whether sequences of this model start with the beginning-of-sequence token."""
    own = header.metadata
    # Where the key is absent, llama.cpp goes by the kind of tokenizer.
    default = own.get("tokenizer.ggml.model") == "llama" or own.get("tokenizer.ggml.pre") in _IGNORE_MERGES
    return "tokenizer.ggml.bos_token_id" in own and bool(own.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(own: dict[str, Any], header: GGUFHeader) -> Tokenizer:
    """BPE over bytes, as of GPT-2."""
    name = own.get("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{header.path}: pre-tokenizer {name!r} is not supported, only {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    vocabulary = {token: index for index, token in enumerate(own["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in own.get("merges", ())]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _IGNORE_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *[pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]],
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(own: dict[str, Any], header: GGUFHeader) -> Tokenizer:
    """BPE over characters with bytes to fall back on, as of SentencePiece and Llama 2.

    SentencePiece merges the two neighbours whose union has the highest score, so every split of a token into two
    tokens is a merge, in the order of the scores.
    """
    tokens, types = own["tokens"], own.get("token_type") or [1] * len(own["tokens"])
    if len(own.get("scores", ())) != len(tokens):
        raise ValueError(
            f"{header.path}: its tokenizer has {len(own.get('scores', ()))} scores for {len(tokens)} tokens"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    usable = {token for token, kind in zip(tokens, types, strict=True) if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = sorted(
        (-own["scores"][vocabulary[token]], vocabulary[token], token[:cut], token[cut:])
        for token in usable
        for cut in range(1, len(token))
        if token[:cut] in usable and token[cut:] in usable
    )
    unknown = own.get("unknown_token_id", next((i for i, kind in enumerate(types) if kind == _UNKNOWN), None))
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for kind in types),
        )
    )
    space = "\u2581"
    prefixed = own.get("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*[normalizers.Prepend(space)] * prefixed, normalizers.Replace(" ", space)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefixed
    )
    return tokenizer
