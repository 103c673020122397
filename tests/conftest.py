"""Where there is no GPU, Triton kernels run in its interpreter.

Triton asks when a kernel is defined, so this precedes every import.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
