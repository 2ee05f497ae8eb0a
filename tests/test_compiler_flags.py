"""The flags that training gives XLA (that compilers accept them, tests/compile shows with real ones)."""

import pytest

from nope_jax import compiler_flags
from nope_jax.compiler_flags import GPU, TPU


@pytest.mark.parametrize(
    ("package", "variable", "flags"),
    [("jax_plugins.xla_cuda12", "XLA_FLAGS", GPU), ("libtpu", "LIBTPU_INIT_ARGS", TPU)],
)
def test_flags_are_added_where_there_is_a_compiler_and_the_users_own_stay(monkeypatch, package, variable, flags):
    monkeypatch.setattr(compiler_flags, "_is_installed", lambda name: name == package)
    added = " ".join(f"--{name}={value}" for name, value in flags.items())
    own = " ".join(f"--{name}=3" for name in flags)
    for before, after in ("", added), (own, own), ("--xla_cpu_use_onednn=true", f"--xla_cpu_use_onednn=true {added}"):
        environment = {variable: before}
        compiler_flags.set_flags(environment)
        assert environment == {variable: after}


def test_without_a_compiler_nothing_is_set(monkeypatch):
    monkeypatch.setattr(compiler_flags, "_FLAGS", (("XLA_FLAGS", GPU, ("jax_plugins.xla_of_no_platform",)),))
    environment: dict[str, str] = {}
    compiler_flags.set_flags(environment)
    assert not environment
