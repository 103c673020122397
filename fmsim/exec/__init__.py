"""The real decode: the DeepSeek-V4 model, its loader and the recorder of its attention."""
