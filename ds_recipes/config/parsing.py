"""One thread at a time in Python's parser for syntax trees.

`ast.parse` and `ast.literal_eval` fail now and then with a SystemError where two threads use them at once (CPython's issue
106905, seen with 3.11.7). numpy reads the header of a .npy file with the latter.
"""

import threading

PARSING = threading.RLock()
