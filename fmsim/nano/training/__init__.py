"""How nano is trained: lengths, batches, a forward pass for long sequences, weights exported."""
