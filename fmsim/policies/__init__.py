"""Policies: which pages of the compressed KV are worth keeping in GPU memory."""
