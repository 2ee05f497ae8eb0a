"""A published model's settings, of which every one is read, known to be harmless, or refused by name."""

from collections.abc import Iterator, Mapping
from typing import Any

HARMLESS = frozenset(
    {
        "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path",
        "name_or_path", "_attn_implementation", "attn_implementation", "use_cache", "is_decoder",
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
        "unk_token_id", "tokenizer_class", "prefix", "initializer_range", "initializer_factor", "init_std",
        "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "emb_pdrop",
        "dropout", "dropout_rate", "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout",
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
        "pretraining_tp", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
        "chunk_size_feed_forward", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
        "typical_p", "num_beams", "num_beam_groups", "diversity_penalty", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "early_stopping", "pruned_heads", "tf_legacy_loss", "use_bfloat16",
        "gradient_checkpointing", "cache_implementation",
    }
)  # fmt: skip
"""What config.json may say of any family without changing the logits: labels, training, generation, ways to compute."""


class Settings(Mapping[str, Any]):
    """The settings in a file; asks back with `refuse_rest` whether all of them were read."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = dict(values)
        self._read: set[str] = set()
        self.where = where
        """For messages: the file, and the path within it."""

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        if name not in self._values:
            raise ValueError(f"{self.where} has no {name}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default if it is absent; null is a value."""
        return self[name] if name in self._values else default

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; the default, unless that is None, where it is absent or null.

        Raises:
            ValueError: it is anything else.
        """
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.where}: {name} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number; the default, unless that is None, where it is absent or null.

        Raises:
            ValueError: it is anything else.
        """
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.where}: {name} must be a number, not {value!r}")
        return value

    def choice(self, name: str, default: Any, choices: Mapping[Any, Any]) -> Any:
        """What the value, or the default where it is absent, stands for.

        Raises:
            ValueError: it is none of the choices.
        """
        value = self.get(name, default)
        if not isinstance(value, str | int | float | bool | None) or value not in choices:
            supported = ", ".join(map(repr, choices))
            raise ValueError(f"{self.where}: {name} {value!r} is not supported, only {supported}")
        return choices[value]

    def only(self, name: str, *values: Any) -> None:
        """Refuse any value but these; absent is as good as the first."""
        self.choice(name, values[0], {value: value for value in values})

    def ignore(self, *names: str) -> None:
        """Count as read what does not change the logits of this family."""
        self._read.update(names)

    def refuse_rest(self, harmless: frozenset[str] = HARMLESS) -> None:
        """Refuse what was not read, unless it is null or harmless: it may change the logits.

        Raises:
            ValueError: names the settings.
        """
        rest = [name for name in self._values if name not in self._read | harmless and self._values[name] is not None]
        if rest:
            listed = ", ".join(f"{name} {str(self._values[name])[:40]!r}" for name in sorted(rest)[:5])
            raise ValueError(f"{self.where} has settings that are not supported: {listed}")
