"""A config file with an encoding of its own; the fixture `config_file` is a path of it."""

CONFIG_FILE = """
import dataclasses
from nope_jax.config import Config, DataConfig, ModelConfig
from nope_jax.encodings import Encoding

@dataclasses.dataclass(frozen=True)
class FromFile(Encoding):
    strength: float = 1.0

def get_config():
    return Config(model=ModelConfig(encoding=FromFile(0.1)), data=DataConfig(context_length=64))
"""
