"""What the machine can do, and what the kernels make of it: `penstock bench ceilings` and `penstock bench kernels`.

ceilings   bytes per second from memory, products per second in registers
cases      which kernels are measured, with which shapes, beside which of torch's operators
timing     one callable after the other, in turns, on weights that no cache holds
"""
