"""Products of rows with weights, and hyper-connections, which begin with one and end beside
the next.
"""
