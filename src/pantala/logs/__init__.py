"""What machines say: collected on their host, kept for a time, published live on the bus."""
