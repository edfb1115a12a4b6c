"""Starts the GPU suite: `python benchmarks/run_gpu_suite.py [--smoke]`, or `make gpu-suite`.

A script and not `python -m` from the checkout's root: that would put the root on the module path,
where the folder `kernels` passes for the package of the same name that transformers looks for.
"""

from gpu_suite.main import main

if __name__ == "__main__":
    raise SystemExit(main())
