"""How one layer is divided among ranks, exact in value, gradient and second derivative."""
