"""From logits to tokens, for a whole batch at once: penalties, masks, filters, random numbers and log-probabilities."""
