"""Qwen3-MoE for SGLang's registry."""

from sglang.srt.models.qwen3_moe import EntryClass as EntryClass
