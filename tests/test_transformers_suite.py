"""transformers' own common tests of models, over every variant."""

import sys
import types
import unittest

import pytest
import torch
from upstream import as_package, excluded, transformers_source
from variants import VARIANTS, make, pixels

import hf_ae

pytestmark = pytest.mark.slow

as_package("transformers_tests", transformers_source() / "tests")
# Of what test_modeling_common imports, the source distribution lacks two mixins: the tests of text generation, which no
# model here has, and those of exporters (tests/test_export.py has our own).
for _module, _mixin in {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}.items():
    _stand_in = types.ModuleType(_module)
    setattr(_stand_in, _mixin, type(_mixin, (), {}))
    sys.modules[f"transformers_tests.{_module}"] = _stand_in

from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402

EXCLUSIONS: dict[str, str] = {
}


class Variant:
    """What the suites ask of a model: a small configuration and inputs."""

    def __init__(self, name: str) -> None:
        self.name, self.is_training = name, True
        self.model = make(name)

    def prepare_config_and_inputs_for_common(self):
        return make(self.name).config, {"pixel_values": pixels(self.model)}


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
