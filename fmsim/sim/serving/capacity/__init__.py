"""How many requests a server holds, and what would move that: without events."""
