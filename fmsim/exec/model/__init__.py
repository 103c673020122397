"""DeepSeek-V4 in torch: its layers, its weights as released, and random ones of full width."""
