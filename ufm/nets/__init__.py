"""Real networks on real images."""
