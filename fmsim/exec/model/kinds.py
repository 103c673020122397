"""The three kinds of layer, by transformers' names, and the logit of what is not visible."""

CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
SLIDING = "sliding_attention"
MASKED = -1e30  # finite, so that a row with nothing visible has a gradient of 0 and not of nan
