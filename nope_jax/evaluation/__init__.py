"""The evaluations of eval.py. `nope_jax.evaluation.registry` lists them and says how to add one."""
