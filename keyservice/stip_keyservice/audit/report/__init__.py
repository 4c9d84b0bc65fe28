"""The report that people read: one HTML page and one Markdown page over the `leakage.json` of several instances.

`judging` says how far a figure is above what one would guess anyway, `numbers` prints it, `words` makes sentences of
it; `matrix`, `plots`, `comparison` and `catalogue` are the page's parts, `pages` and `markdown` put them together.
"""
