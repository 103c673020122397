"""Many requests on one server: arrivals, admission, continuous batching, and what binds."""
