"""`python -m strop.kernels`: compile the native library into this package's folder."""

import sys

from strop.kernels.build import main

if __name__ == "__main__":
    sys.exit(main())
