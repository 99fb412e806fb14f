"""The registry: each published or derived statement as an executable check with its evidence."""

from ufm.lab.claims import balanced, diagrams, dynamics, imbalanced, landscape, saddles

REGISTRY = (
    *balanced.CLAIMS,
    *saddles.CLAIMS,
    *imbalanced.CLAIMS,
    *landscape.CLAIMS,
    *diagrams.CLAIMS,
    *dynamics.CLAIMS,
)
