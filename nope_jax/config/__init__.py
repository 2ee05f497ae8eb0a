"""The config of a run: defined by a Python file, overridden on the command line, saved as JSON in the workdir.

    schema.py      the fields, as frozen dataclasses
    choices.py     the settings that only some optimizers or schedules have
    validation.py  the validation rules and their error messages
    format.py      the version of the format of a workdir
    files.py       config files, and config.json in a workdir
    own_code.py    the code of a user's own encoding, copied into the workdir

A config file is plain Python with a `get_config()` that returns a `Config`. The command line (`nope_jax.cli`) overrides
any field by its dotted name (`--model.encoding alibi`). To add a field, add a line to `schema.py`; to constrain it, add
a rule to `validation.py`. `nope_jax.training.resume` defines which fields may change when a run is resumed.
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
    Step,
    TrainConfig,
    override,
)
from nope_jax.config.validation import of_other_sources, takes_several, unknown, wanted

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
    "Step",
    "TrainConfig",
    "code_digest",
    "load",
    "load_file",
    "of_other_sources",
    "override",
    "refuse_changed_code",
    "save",
    "takes_several",
    "unknown",
    "wanted",
]
