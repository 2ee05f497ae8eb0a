"""The settings that only some optimizers or schedules have, with their defaults.

A field of `OptimizerConfig` that is in one of these tables is None unless it is given: the default is that of the
optimizer or schedule which is chosen, and a value for one that does not have the setting is refused.
"""

from collections.abc import Mapping
from types import MappingProxyType

Settings = Mapping[str, Mapping[str, float]]

OPTIMIZERS: Settings = MappingProxyType(
    {
        "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
        "lion": {"b1": 0.9, "b2": 0.99},
        "adafactor": {"b1": 0.0, "decay_rate": 0.8, "eps": 1e-30},
        "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.95, "eps": 1e-8},
    }
)
"""The settings of every `optimizer.name`."""

SCHEDULES: Settings = MappingProxyType(
    {
        "cosine": {"floor": 0.1},
        "linear": {"floor": 0.1},
        "constant": {},
        "wsd": {"floor": 0.1, "decay_share": 0.2},
    }
)
"""The settings of every `optimizer.schedule`."""

CHOICES: Mapping[str, Settings] = MappingProxyType({"name": OPTIMIZERS, "schedule": SCHEDULES})
"""The tables by the field of `OptimizerConfig` that chooses."""
