"""What a command does, from its settings to its results: one file a command, or a folder.
`workers` and `results` are for all of them.
"""
