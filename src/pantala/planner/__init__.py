"""Decisions as values: placement, deploys, autostop. No I/O, no clock of their own."""
