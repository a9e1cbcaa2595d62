"""Weight formats other than plain floating point: one file per format."""
