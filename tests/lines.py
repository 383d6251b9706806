"""For which releases of transformers a test is.

ONCE is for what no release of transformers changes: MiniBench's questions, the page, the order of what reports write.
"""

import pytest
import transformers
from packaging.version import Version

from dpvr.training.arguments import OLDEST_TRANSFORMERS
from versions_dpvr import NEWEST_TESTED

NEEDS_TRAINING = pytest.mark.skipif(
    Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS),
    reason="training is for transformers 5.18 and newer",
)
ONCE = pytest.mark.skipif(
    not transformers.__version__.startswith(NEWEST_TESTED),
    reason=f"no release of transformers changes what is tested: {NEWEST_TESTED} alone",
)
