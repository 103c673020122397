"""Kernels run in Triton's interpreter where there is no GPU, and there it is made quicker."""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from quick_interpreter import quicken

    quicken()
