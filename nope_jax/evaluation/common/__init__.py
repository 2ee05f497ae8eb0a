"""Code shared by the evaluations."""
