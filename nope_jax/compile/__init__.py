"""Ahead-of-time compilation of a run for absent devices, to estimate memory, time and communication.

The files, each importing only those above it:

    program.py      parses the text of a compiled program: computations, loops, arrays
    collectives.py  communication between devices: bytes, mesh axes and number of executions
    machine.py      what is compiled for: chips, their links, the network between slices or hosts, the time of both
    memory.py       memory per chip, and the shortage if a program does not fit
    tpu.py          TPU slices, and the time of computation on them
    gpu.py          the same for GPUs; to add a platform, add a file like this one
    estimate.py     compiles a run for a machine and collects these estimates
    report.py       the report of `train.py --compile_for v5e:16x16`, with settings that fit if the run does not

Nothing here runs a program.
"""
