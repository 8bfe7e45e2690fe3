"""Found by the interpreter of a camera's worker when a test puts this folder on its path: makes its driver fail.

HOTPIXD_TEST_FAULTS holds JSON, see `port_faults.Faults`.
"""

import os

if "HOTPIXD_TEST_FAULTS" in os.environ:
    import port_faults

    port_faults.install(os.environ["HOTPIXD_TEST_FAULTS"])
