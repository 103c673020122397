"""Charts as SVG, drawn here: they need no script, print, follow the reader's dark mode, and can be
taken out of the page one by one.
"""
