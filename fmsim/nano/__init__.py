"""The small DeepSeek-V4 that is trained here: its config, its prompts, its shipped weights."""
