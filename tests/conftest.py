"""Settings of every test, made before JAX is imported."""

import os

# Tests compile a lot and compute little: LLVM's optimisations cost more than they save here.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
