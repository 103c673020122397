"""LSA's memory indexer (arXiv 2606.09079): its scorer, labels, training, evaluation and
checkpoints.
"""
