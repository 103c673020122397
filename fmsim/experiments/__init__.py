"""What a command does, from its settings to its results: one file a command."""
