"""What rows of activations go through between products: norm, RoPE, rounding to float8."""
