# The part of brotli that is used; the package brings no types.

class error(Exception): ...  # noqa: N801 (its name)

class Decompressor:
    def process(
        self, data: bytes | bytearray | memoryview, output_buffer_limit: int = ...
    ) -> bytes: ...
    def is_finished(self) -> bool: ...

def compress(
    string: bytes | bytearray | memoryview,
    mode: int = 0,
    quality: int = 11,
    lgwin: int = 22,
    lgblock: int = 0,
) -> bytes: ...
def decompress(data: bytes | bytearray | memoryview) -> bytes: ...
