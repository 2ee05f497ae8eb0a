"""Writes a model, trained, tuned or published, as a folder that transformers loads.

    python -m nope_jax.export --workdir runs/smollm2-yarn --out SmolLM2-yarn

Of a run, it is the newest checkpoint, or that of --step N or best; the average of the weights if the run has one.
`nope_jax.interop.save_pretrained` says what a folder can hold. Exit status: 0 written, 1 unexpected error, 2 bad input.
"""

import sys

from nope_jax.cli import parse_export, run


def main() -> None:
    workdir, out, family, step = parse_export(sys.argv[1:])
    # Import late, because it takes seconds and bad arguments should fail at once.
    from nope_jax.data import load_tokenizer
    from nope_jax.interop import save_pretrained
    from nope_jax.trained import find_trained

    trained = find_trained(workdir, step)
    data = trained.config.data
    tokenizer = load_tokenizer(data.tokenizer, data.separator_token)
    model, _ = trained.load()
    save_pretrained(model, out, tokenizer=tokenizer, bos=data.bos, family=family)


if __name__ == "__main__":
    sys.exit(run(main))
