"""Triton kernels for NVIDIA GPUs, each with its plain-torch twin beside it.

Importing a module of this package needs the triton package; `support` does not, and says whether it is there. With TRITON_INTERPRET=1 in
the environment kernels run on a CPU, slowly, which is how the default tests compare them with their twins. There `tl.dot` takes no
bfloat16, so that bfloat16 is compared on a GPU only.
"""
