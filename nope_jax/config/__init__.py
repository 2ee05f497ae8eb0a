"""What a run is: its config, which a Python file states, the command line overrides and the workdir keeps as JSON.

    schema.py      the fields: frozen dataclasses, each field written once
    validation.py  what is refused, and in which words
    files.py       config files, and config.json in a workdir
    own_code.py    the code of a user's own encoding, which a workdir keeps beside it

A config file is plain Python with a `get_config()` that returns a `Config`. The command line (`nope_jax.cli`) overrides
any field by its dotted name (`--model.encoding alibi`). A new field is a line of `schema.py`, a rule about it one of
`validation.py`; whether a run may go on with another value is said in `nope_jax.training.resume`.
"""

from nope_jax.config.files import code_digest, load, load_file, refuse_changed_code, save
from nope_jax.config.schema import (
    GROUPS,
    HINTS,
    Config,
    DataConfig,
    EncodingSpec,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
)
from nope_jax.config.validation import takes_several, unknown, wanted

__all__ = [
    "GROUPS",
    "HINTS",
    "Config",
    "DataConfig",
    "EncodingSpec",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "code_digest",
    "load",
    "load_file",
    "override",
    "refuse_changed_code",
    "save",
    "takes_several",
    "unknown",
    "wanted",
]
