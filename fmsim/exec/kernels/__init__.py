"""GPU kernels of the decode, one file each: the function to call, its torch reference (also the
CPU's path) and its Triton kernel. A folder a part of the step; beside the folders is what they
share.
"""
