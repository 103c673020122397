"""Traces from elsewhere: dense models' own attention, and FlashMemory's dumps, both ways."""
