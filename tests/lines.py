"""For which releases of transformers a test is.

No release of transformers changes what processes, signals and MiniBench's questions do: the newest line tests them.
The other libraries are the same on all lines, but that 4.57.6 keeps huggingface_hub, datasets and gradio back.
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
