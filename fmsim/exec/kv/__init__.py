"""Where KV lies: slots on the GPU, the mirror in host memory, and the copies between them."""
