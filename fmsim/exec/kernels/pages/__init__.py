"""Pages of the KV cache: entries written into them, their copies between memories, their
tables.
"""
