"""Distinguishes bad input, reported in one line, from program errors, which need a traceback."""

import dis
import os
from pathlib import Path

_HERE = f"{Path(__file__).parent}{os.sep}"


def is_refusal(error: BaseException) -> bool:
    """Whether one of our checks raised this: a ValueError whose traceback ends at a `raise` statement of this package.

    Any other ValueError comes from a library or from user code, even if we called it.
    """
    last = error.__traceback__
    if last is None or not isinstance(error, ValueError):
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return code.co_filename.startswith(_HERE) and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
