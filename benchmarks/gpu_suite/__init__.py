"""What the kernels do on a GPU, in one command: ceilings, correctness, speed, peers, a whole step.

The parent process (main, supervisor, bundle, report) imports no torch and starts a child for each
section, so that a crash, a hang or a broken CUDA context costs one case. A section is a module with
`cases(scale, results)`; everything else is shared by sections. `--smoke` runs the same code on a
CPU at sizes that take seconds: its times mean nothing.
"""
