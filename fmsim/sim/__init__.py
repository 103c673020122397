"""What a ledger costs in time on a machine: one decode, or many requests, simulated."""
