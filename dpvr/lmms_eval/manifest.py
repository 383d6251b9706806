"""What lmms-eval reads at its start, by the entry point in pyproject.toml; the model is imported when it is asked for.

It stands apart from model.py so that an import that fails there is the error of the run, not a warning and a model
that nobody knows.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="dpvr_llava", chat_class_path="dpvr.lmms_eval.model.DpvrLlava")
