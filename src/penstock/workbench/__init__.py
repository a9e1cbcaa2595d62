"""Measuring tools: load generation and reports. Uses Penstock from outside, through HTTP and `penstock.LLM`, as any user would."""
