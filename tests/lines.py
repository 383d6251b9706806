"""For which releases of transformers a test is.

ONCE is for what no release of transformers changes: MiniBench's pictures and questions, the page in a browser, what is
written from results/, and the rooms of the repository.
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
