"""How nano is trained, examined and exported; its traces recorded."""
