"""Training: the loop, its steps, and what a person sees of them."""
