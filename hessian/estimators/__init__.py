"""What one asks of a curvature matrix."""
