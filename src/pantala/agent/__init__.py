"""One host; one task owns each machine."""
