"""The published memory indexer's size (arXiv 2606.09079): what a decision's scoring takes."""

PUBLISHED_HEADS = 128  # of a layer
PUBLISHED_WIDTH = 128  # of each
