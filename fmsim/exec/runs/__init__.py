"""Whole runs of the engine: a prompt answered, a trace recorded, a decode with random weights
timed.
"""
