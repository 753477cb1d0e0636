"""What the demo makes for itself: captioned pictures and clips of two domains, and questions about them.

Everything follows from a seed.
"""

import warnings

# Of ``python -m`` of a module here: the package, which is imported first, has imported it too; it holds no state.
warnings.filterwarnings("ignore", "'lavis_aurora.demo", RuntimeWarning, "runpy")
