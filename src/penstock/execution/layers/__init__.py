"""Building blocks that every architecture shares: linear, attention, rotary, norm, embedding, activation."""
