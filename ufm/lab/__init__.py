"""Where theory, numerics and measurement meet: claims, records, figures."""
