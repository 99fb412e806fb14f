"""The registry: each published or derived statement as an executable check with its evidence."""

from ufm.lab.claims import balanced, imbalanced, saddles

REGISTRY = (*balanced.CLAIMS, *saddles.CLAIMS, *imbalanced.CLAIMS)
