"""What the compiler says of a run on devices that are not here: memory, time, and what is sent between them.

The files, each of which imports those above it alone:

    program.py      the text of a compiled program: its computations and loops
    collectives.py  what it sends between devices, along which axes of the mesh and how often
    memory.py       what it needs of each chip, and by how much it does not fit
    tpu.py          slices of TPUs: their chips, and the time that they take; another platform is one more such file
    estimate.py     a run compiled for a slice, and all of this read out of it
    report.py       that in words, and what would fit where the run does not: `train.py --compile_for v5e:16x16`

Nothing here runs a program.
"""
