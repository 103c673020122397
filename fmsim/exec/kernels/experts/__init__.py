"""A layer's experts: which ones a token takes, and what they make of it."""
