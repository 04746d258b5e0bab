"""The family of Llama."""

from __future__ import annotations

from trainer.models.families.common import decoder
from trainer.models.reading import JsonObject
from trainer.models.shape import ModelShape


def _llama(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    f.only("mlp_bias", False)
    return ModelShape(**decoder(f))


READERS = {"llama": _llama}
