"""Traces from elsewhere: dense models of transformers, and FlashMemory's dumps, read and written."""
