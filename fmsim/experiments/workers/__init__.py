"""Work in supervised processes: what became of it, and how far it is."""
