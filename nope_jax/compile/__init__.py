"""Ahead-of-time compilation of a run for absent devices, to estimate memory, time and communication.

The files, each importing only those above it:

    program.py      parses the text of a compiled program: computations and loops
    collectives.py  communication between devices: bytes, mesh axes and number of executions
    memory.py       memory per chip, and the shortage if a program does not fit
    tpu.py          TPU slices: their chips, and time estimates; to add a platform, add a file like this one
    estimate.py     compiles a run for a slice and collects these estimates
    report.py       the report of `train.py --compile_for v5e:16x16`, with settings that fit if the run does not

Nothing here runs a program.
"""
