"""The mathematics of `numerics`, fast: kernels in C++ for raw CPU arrays, behind one choice that can be forced.

    csrc/          the kernels, once in plain C++, compiled for each instruction set (portable, AVX2, AVX-512, NEON)
    build.py       compiles them, when the package is installed and by `python -m strop.kernels`
    library.py     finds and checks the library, chooses the instruction set, and says which is in use and why
    operations.py  the kernels on tensors
    block.py       the parts of a decoder's block that are no products
    int8.py        rows rounded to int8, and their products
    adam.py        a step of AdamW with moments in 8 bits

The package lies below `numerics`, which calls it wherever it can and is the reference everywhere else: it knows bits,
groups and tables, and neither schemes nor layers. `STROP_KERNELS=reference` (portable, avx2, avx512, neon) forces one.

It does not: multiply matrices where oneDNN is at the machine's limit, or run anywhere but on a CPU.
"""

from strop.kernels.library import Choice, forced, in_use

__all__ = ["Choice", "forced", "in_use"]
