"""How good a model's answers are, as opposed to how fast: perplexity of a text, divergence from another model. Through `penstock.LLM`."""
