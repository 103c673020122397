"""Whole sequences at once, with gradients where they are wanted: training's forward, and the
engine's way to read a long prompt.
"""
