"""Found by the interpreters of the product when the power harness puts this folder on their path.

TEST_POWER holds JSON, see `power_hook.install`.
"""

import os

if "TEST_POWER" in os.environ:
    import power_hook

    power_hook.install(os.environ["TEST_POWER"])
