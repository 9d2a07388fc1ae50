"""fastkd inside the trainers of others: one module for each, imported by its full name."""
