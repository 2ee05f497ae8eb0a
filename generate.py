"""Continues a text with a trained model, and prints the continuation as it comes.

    python generate.py --workdir runs/nope --prompt 'def main(' --max_new_tokens 200 --temperature 0.8 --top_p 0.95
    git diff | python generate.py --workdir hf:HuggingFaceTB/SmolLM2-135M --prompt - > continued.txt

The model is the workdir of a run (its newest checkpoint, or that of --step N or --step best) or a published one,
hf:NAME_OR_FOLDER or gguf:FILE. Without --temperature it takes the most likely token at every step. It ends after
--max_new_tokens tokens, at the token that separates documents, or before one of the texts of --stop. Only the
continuation is printed, and a newline. It takes one device; --mesh.tensor 8, for instance, spreads the parameters over
eight, as in training.
Exit status: 0 finished, 1 unexpected error, or one in an encoding's own code, with its traceback, 2 bad input, 130
interrupted (Ctrl-C), 141 nobody reads stdout any more.
"""

import sys

from nope_jax.cli import parse_generate, run


def main() -> None:
    options = parse_generate(sys.argv[1:])
    # Import late, because it takes seconds and bad arguments should fail at once.
    from nope_jax.text_generation import GenerateOptions, write_text

    # What a terminal or pipe has no letters for is replaced, not an error.
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="replace")
    write_text(GenerateOptions(**options), sys.stdout)


if __name__ == "__main__":
    sys.exit(run(main))
