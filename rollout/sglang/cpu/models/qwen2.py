"""Qwen2 for SGLang's registry."""

from sglang.srt.models.qwen2 import EntryClass as EntryClass
