"""A theory lab for neural collapse."""
