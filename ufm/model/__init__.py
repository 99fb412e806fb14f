"""What is studied: the unconstrained features model, its losses and its geometry."""
