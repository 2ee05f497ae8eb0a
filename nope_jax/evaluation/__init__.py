"""What eval.py does with trained models: one function per evaluation, each called as f(options, command=...)."""

from nope_jax.evaluation.comparison import compare, curves
from nope_jax.evaluation.passkey import passkey
from nope_jax.evaluation.probes import probe
from nope_jax.evaluation.similarity import similarity
from nope_jax.evaluation.tuning import tune

__all__ = ["compare", "curves", "passkey", "probe", "similarity", "tune"]
