"""The flags that training gives XLA (that compilers accept them, tests/compile/test_gpu.py shows with a real one)."""

from nope_jax import compiler_flags


def test_flags_are_added_where_there_is_a_plugin_and_the_users_own_stay(monkeypatch):
    monkeypatch.setattr(compiler_flags, "_has_gpu_plugin", lambda: True)
    own, environment = "--xla_gpu_enable_pipelined_all_gather=false --xla_cpu_use_onednn=true", {}
    compiler_flags.set_flags(environment)
    assert environment["XLA_FLAGS"].split() == [f"--{name}={value}" for name, value in compiler_flags.GPU.items()]
    environment["XLA_FLAGS"] = own
    compiler_flags.set_flags(environment)
    assert environment["XLA_FLAGS"] == own
    environment["XLA_FLAGS"] = "--xla_cpu_use_onednn=true"
    compiler_flags.set_flags(environment)
    assert environment["XLA_FLAGS"] == "--xla_cpu_use_onednn=true --xla_gpu_enable_pipelined_all_gather=true"


def test_without_a_plugin_nothing_is_set(monkeypatch):
    monkeypatch.setattr(compiler_flags, "_PLUGINS", ("jax_plugins.xla_of_no_platform",))
    environment: dict[str, str] = {}
    compiler_flags.set_flags(environment)
    assert not environment
