"""Codecs of formats and protocols: bytes in, values out, no I/O."""
