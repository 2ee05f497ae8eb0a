"""The settings that only some optimizers or schedules have, with their defaults.

A field of `OptimizerConfig` that is in one of these tables is None unless it is given: the default is that of the
optimizer or schedule which is chosen, and a value for one that does not have the setting is refused.
"""

from collections.abc import Mapping
from types import MappingProxyType

Settings = Mapping[str, Mapping[str, float]]

SCHEDULES: Settings = MappingProxyType(
    {
        "cosine": {"floor": 0.1},
        "linear": {"floor": 0.1},
        "constant": {},
        "wsd": {"floor": 0.1, "decay_share": 0.2},
    }
)
"""The settings of every `optimizer.schedule`."""

CHOICES: Mapping[str, Settings] = MappingProxyType({"schedule": SCHEDULES})
"""The tables by the field of `OptimizerConfig` that chooses."""
