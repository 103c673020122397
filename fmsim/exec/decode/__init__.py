"""The engine: a prompt read once, then decoded under a policy, step by step, without waiting for
the host.
"""
