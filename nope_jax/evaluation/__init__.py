"""What eval.py does with trained models; `nope_jax.evaluation.registry` lists it, and says how to add to it."""
