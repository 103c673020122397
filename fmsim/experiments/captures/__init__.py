"""What is asked of a capture: a run from its file alone, and statistics."""
