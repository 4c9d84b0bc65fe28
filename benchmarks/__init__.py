"""What STIP costs: measured, interleaved with a control, and written down as it came out."""
