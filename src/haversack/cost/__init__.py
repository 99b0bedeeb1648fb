"""What every option costs: bytes, seconds, damage."""
