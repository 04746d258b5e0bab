"""Llama for SGLang's registry."""

from sglang.srt.models.llama import EntryClass as EntryClass
