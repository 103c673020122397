"""Attention of a decode token over its window and what it selected."""
