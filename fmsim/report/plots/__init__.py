"""Plots of a report, by plotly."""
