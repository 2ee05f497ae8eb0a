"""From trained models to curves by position, and from curves to a table, two figures and a report."""

from nope_jax.evaluation.comparison import compare

__all__ = ["compare"]
