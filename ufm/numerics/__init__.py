"""What is computed: solvers for any scalar function of any pytree."""
