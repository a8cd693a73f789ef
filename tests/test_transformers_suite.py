"""transformers' own common tests of models, over every variant."""

import sys
import types
import unittest

import pytest
from upstream import as_package, excluded, transformers_source
from variants import VARIANTS, make, pixels

import hf_ae

pytestmark = pytest.mark.slow

as_package("transformers_tests", transformers_source() / "tests")
# Of what test_modeling_common imports, the source distribution lacks two mixins: the tests of text generation, which
# no model here has, and those of exporters (tests/test_export.py has our own).
_missing = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
for _module, _mixin in _missing.items():
    _stand_in = types.ModuleType(_module)
    setattr(_stand_in, _mixin, type(_mixin, (), {}))
    sys.modules[f"transformers_tests.{_module}"] = _stand_in

from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402

EXCLUSIONS = {"test_model_get_set_embeddings": "of token embeddings, which autoencoders of images do not have"}


class Variant:
    """What the suite asks of a model: a small configuration, inputs, and the shape of its hidden states."""

    batch_size = 4
    num_hidden_layers = 2  # at most, says the suite, which counts by the number below

    def __init__(self, name: str) -> None:
        self.name, self.is_training = name, True
        self.model = make(name).eval()
        states = self.model(pixels(self.model), output_hidden_states=True).hidden_states
        self.expected_num_hidden_layers = len(states)
        self.seq_length, self.hidden_size = states[0].shape[-2:]

    def prepare_config_and_inputs_for_common(self):
        return make(self.name).config, {"pixel_values": pixels(self.model, self.batch_size)}


class Suite(ModelTesterMixin):
    name = ""
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = Variant(self.name)


SUITE = excluded(Suite, EXCLUSIONS)

for _name, (_model_type, _) in VARIANTS.items():
    _title = "Test" + "".join(part.capitalize() for part in _name.split("-"))
    _fields = {"name": _name, "all_model_classes": (hf_ae.MODELS[_model_type],), "__module__": __name__}
    globals()[_title] = type(_title, (SUITE, unittest.TestCase), _fields)
