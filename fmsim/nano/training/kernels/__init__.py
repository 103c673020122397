"""Triton kernels of training, forward and backward; the files beside this folder call them."""
