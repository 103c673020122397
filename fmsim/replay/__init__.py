"""A trace replayed against a policy: which pages are on the GPU at each step, and what that misses;
no clock, no bytes.
"""
