"""Triton kernels of whole sequences, forward and backward; the files beside this folder call
them.
"""
