"""What a width costs: bytes and bit operations, layer by layer."""
