"""Qwen3 for SGLang's registry."""

from sglang.srt.models.qwen3 import EntryClass as EntryClass
