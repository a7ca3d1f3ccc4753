"""Deep compression autoencoders (DC-AE, arXiv 2410.10733) in JAX."""
