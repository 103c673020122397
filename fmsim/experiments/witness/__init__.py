"""A second witness: a dense model that nobody here trained, with a lightning indexer trained beside
each of its layers, its own weights frozen (`benchmarks/witness.sh` runs all of it).
"""
