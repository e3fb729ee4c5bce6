"""Decisions without I/O or clock: what is goes in, what to do comes out."""
