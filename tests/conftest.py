"""Set up before any test imports the package."""

import os

# Kernels run in Triton's CPU interpreter, which a kernel picks or not when it is decorated: this
# must come before the first import of triton. TRITON_INTERPRET=0 runs them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

# Tensors in tests are too small for threads to pay, and runners often have two cores.
torch.set_num_threads(1)
