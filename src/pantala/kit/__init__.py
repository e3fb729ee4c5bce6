"""Leaves that know nothing of the product: clock, ids, units, redaction, processes."""
