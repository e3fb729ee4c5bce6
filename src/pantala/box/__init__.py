"""The cluster in a box: each host a network namespace with its own processes, joined by a router namespace."""
