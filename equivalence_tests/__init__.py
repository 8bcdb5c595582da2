"""The proof that the optimized implementation equals the reference: strategies, tolerances, suites."""
