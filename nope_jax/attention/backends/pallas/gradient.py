"""What the backward passes of kernels have in common.

Shapes as in `pallas`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from nope_jax.attention.softmax_state import named
from nope_jax.jax_settings import in_32_bits, with_implicit_promotion


def differentiable(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Attention over all keys, and over a part of them whose results over all keys are given; with a gradient.

    Args:
        forward: From static arguments, operands and tokens to output, entropy and logsumexp.
        backward: From static arguments, operands, tokens, these results and their cotangents to the gradients of the
            operands, of the contribution of the given keys.

    Returns:
        Two functions of static arguments, operands and tokens; the second also takes the results, and returns them.
    """
    forward, backward = (in_32_bits(with_implicit_promotion(rule)) for rule in (forward, backward))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(static: Any, operands: Any, tokens: Any):
        return forward(static, operands, tokens)

    def with_residuals(static, operands, tokens):
        results = named(forward(static, operands, tokens))
        return results, (operands, tokens, results)

    def gradients(static, residuals, cotangents):
        return backward(static, *residuals, cotangents), None

    attend.defvjp(with_residuals, gradients)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend_part(static: Any, operands: Any, tokens: Any, final_rows: Any):
        return final_rows

    attend_part.defvjp(
        lambda static, operands, tokens, final_rows: (final_rows, (operands, tokens, final_rows)),
        lambda static, residuals, cotangents: (*gradients(static, residuals, cotangents), None),
    )
    return attend, attend_part
