"""Native and Triton kernels, each beside a plain-torch function that defines the right answer."""
