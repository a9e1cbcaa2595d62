"""One file per architecture, named after the Hugging Face model_type, with the configuration, the registry and the loader."""
