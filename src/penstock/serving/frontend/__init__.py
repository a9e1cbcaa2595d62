"""From text to tokens and back: tokenizer, chat template, detokenizer, and the client of a local engine."""
