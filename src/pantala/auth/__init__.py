"""Tokens and what they allow; checked without I/O."""
