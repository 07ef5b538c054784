"""The container of a payload: streams of bytes in zstd frames.

    payload = magic, u32 frame count, (u64 compressed bytes, u64 raw bytes) per frame, then the zstd frames

A frame holds whole tensors and closes after 4 MiB of raw bytes, so a payload is decoded with one frame in memory, and
frames can be decoded in parallel. Each stream of at least 1 KiB starts a zstd block of its own, and with it a Huffman
table of its own: gap bytes and XOR bytes have little in common (8-10% smaller than one table for all of them).

Reading trusts nothing: a zstd block takes at least 3 bytes and gives at most 128 KiB, which bounds what a frame may
claim by what it brought, before anything is allocated.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import zstandard

from rlorch.errors import DigestMismatchError

MAGIC = b"RLW1"
FRAME_BYTES = 4 << 20
"""Raw bytes after which a frame closes: enough for zstd, small enough to stream."""
BLOCK_BYTES = 1 << 10
"""Streams shorter than this share a block: a Huffman table costs about a hundred bytes."""
_MAX_RAW_PER_BLOCK = 128 << 10


def compress(streams: Sequence[bytes], level: int) -> bytes:
    """One zstd frame of the streams, one after another."""
    total = sum(map(len, streams))
    stream_compressor = zstandard.ZstdCompressor(level=level).compressobj(size=total)
    parts: list[bytes] = []
    for stream in streams:
        parts.append(stream_compressor.compress(stream))
        if len(stream) >= BLOCK_BYTES:
            parts.append(stream_compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(stream_compressor.flush())
    return b"".join(parts)


@dataclass(slots=True)
class FrameWriter:
    """Gathers the streams of tensors into frames."""

    level: int
    _offset: int = 0
    _open: list[bytes] = field(default_factory=list[bytes])
    _open_bytes: int = 0
    _frames: list[bytes] = field(default_factory=list[bytes])
    _raw_sizes: list[int] = field(default_factory=list[int])

    def add(self, streams: Sequence[bytes]) -> tuple[int, int]:
        """Append one tensor's streams; returns their (offset, length) in the concatenation of all raw bytes."""
        offset, length = self._offset, sum(map(len, streams))
        self._open += streams
        self._open_bytes += length
        self._offset += length
        if self._open_bytes >= FRAME_BYTES:
            self._close_frame()
        return offset, length

    def payload(self) -> bytes:
        """All of it. Nothing can be added after."""
        self._close_frame()
        sizes = [struct.pack("<QQ", len(f), raw) for f, raw in zip(self._frames, self._raw_sizes, strict=True)]
        return b"".join([MAGIC, struct.pack("<I", len(self._frames)), *sizes, *self._frames])

    def _close_frame(self) -> None:
        if self._open_bytes:
            self._frames.append(compress(self._open, self.level))
            self._raw_sizes.append(self._open_bytes)
            self._open, self._open_bytes = [], 0


def read_frames(payload: bytes, malformed: Callable[[str], DigestMismatchError]) -> Iterator[memoryview]:
    """The raw bytes of each frame, in order.

    Raises:
        DigestMismatchError: as `malformed` makes it from what is wrong with the payload.
    """
    if payload[:4] != MAGIC or len(payload) < 8:
        raise malformed(f"it starts with {payload[:4]!r}, not {MAGIC!r}")
    (num_frames,) = struct.unpack_from("<I", payload, 4)
    position = 8 + 16 * num_frames
    if position > len(payload):
        raise malformed(f"it is too short for {num_frames} frames")
    decompressor = zstandard.ZstdDecompressor()
    view = memoryview(payload)
    for number in range(num_frames):
        size, raw_size = struct.unpack_from("<QQ", payload, 8 + 16 * number)
        frame = view[position : position + size]
        position += size
        if position > len(payload) or not 0 < raw_size <= (size // 3 + 1) * _MAX_RAW_PER_BLOCK:
            raise malformed(f"frame {number} cannot hold {raw_size} bytes in {size}")
        try:
            if zstandard.get_frame_parameters(frame).content_size != raw_size:
                raise malformed(f"frame {number} does not hold {raw_size} bytes")
            raw = decompressor.decompress(frame, max_output_size=raw_size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise malformed(f"frame {number} does not decompress ({error})") from None
        if len(raw) != raw_size:
            raise malformed(f"frame {number} gave {len(raw)} bytes, not {raw_size}")
        yield memoryview(raw)
    if position != len(payload):
        raise malformed(f"{len(payload) - position} bytes follow the last frame")
