"""Groups of parameters and the strength λ_k of each."""
