"""What holds calls of nope_jax to their signatures in tests, by jaxtyping's import hook (see pyproject.toml)."""

import beartype
import numpy as np

check = beartype.beartype(
    conf=beartype.BeartypeConf(
        is_pep484_tower=True,  # an int is a float
        hint_overrides=beartype.FrozenDict({int: int | np.integer}),
    )
)
