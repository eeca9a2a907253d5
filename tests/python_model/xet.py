"""The storage behind a hub: takes what hf_xet uploads, and puts files together from it.

A xorb holds chunks of files, each with a header of 8 bytes and, if that is smaller, compressed as an LZ4 frame. A shard says of
each file which chunks of which xorbs it consists of, and its SHA-256.
"""

from __future__ import annotations

import re
import struct
import time
from typing import Any

HEADER = 48
"""Bytes of a shard's header and of each of its entries."""
END = b"\xff" * 32
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30
"""Flags of a file in a shard: as many entries again for verification follow, and one with its SHA-256."""
TOKEN = "of the storage"


class Xet:
    """Attributes: ``blobs`` receives each file by its SHA-256."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.blobs = blobs
        self._chunks: dict[str, list[bytes]] = {}

    def access(self, url: str) -> dict[str, Any]:
        """What a hub tells a client that asks for the storage."""
        return {"casUrl": url, "accessToken": TOKEN, "exp": int(time.time()) + 3600}

    def answer(self, request: str, body: bytes, headers: Any) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of a reply."""
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "no access"}
        if (found := re.fullmatch(r"POST /v1/xorbs/default/(\w{64})", request)) is not None:
            self._chunks[found[1]] = _chunks(body)
            return 200, {"was_inserted": True}
        if request == "POST /v1/shards":
            self._read(body)
            return 200, {"result": 1}
        return 404, {
            "error": "not here"
        }  # known chunks, grants for xorbs, a second version: the client goes on without

    def _read(self, shard: bytes) -> None:
        assert shard.startswith(b"HFRepoMetaData\0")
        place = HEADER
        while (head := shard[place : place + HEADER])[:32] != END:
            flags, count = struct.unpack_from("<II", head, 32)
            data = b""
            for entry in range(count):
                part = shard[place + (entry + 1) * HEADER :][:HEADER]
                size, start, end = struct.unpack_from("<III", part, 36)
                data += (found := b"".join(self._chunks[_hexadecimal(part)][start:end]))
                assert len(found) == size
            place += HEADER * (1 + count + count * bool(flags & VERIFIED))
            assert flags & WITH_SHA256
            self.blobs[_hexadecimal(shard[place:])] = data
            place += HEADER


def _hexadecimal(hash_: bytes) -> str:
    """A hash is kept as four numbers of 8 bytes, lowest byte first."""
    return "".join(hash_[at : at + 8][::-1].hex() for at in range(0, 32, 8))


def _chunks(xorb: bytes) -> list[bytes]:
    found, place = [], 0
    while (
        place < len(xorb) and xorb[place] == 0
    ):  # the version of a chunk's header; what follows the chunks begins otherwise
        packed, kind, size = (
            int.from_bytes(xorb[place + a : place + b], "little") for a, b in ((1, 4), (4, 5), (5, 8))
        )
        data = xorb[place + 8 : place + 8 + packed]
        place += 8 + packed
        if kind:
            data = _decompressed(data)
        if kind == 2:  # the first bytes of all groups of four, then the second ones, ..
            data, grouped = bytearray(size), data
            for index in range(4):
                count = len(range(index, size, 4))
                data[index::4], grouped = grouped[:count], grouped[count:]
        assert len(data) == size
        found.append(bytes(data))
    return found


def _decompressed(frame: bytes) -> bytes:
    """The content of an LZ4 frame without checksums of blocks."""
    assert frame[:4] == b"\x04\x22\x4d\x18" and not frame[4] & 0b10000
    place = 7 + 8 * bool(frame[4] & 0b1000)
    out = bytearray()
    while size := int.from_bytes(frame[place : place + 4], "little"):
        place += 4
        block = frame[place : place + (size & 0x7FFFFFFF)]
        place += len(block)
        if size >> 31:
            out += block
        else:
            _add_block(out, block)
    return bytes(out)


def _add_block(out: bytearray, block: bytes) -> None:
    """Append what an LZ4 block says: some bytes as they are, then some of those before, again and again."""
    place = 0

    def more(count: int) -> int:
        nonlocal place
        if count == 15:
            while True:
                count += (extra := block[place])
                place += 1
                if extra != 255:
                    break
        return count

    while place < len(block):
        token = block[place]
        place += 1
        count = more(token >> 4)
        out += block[place : place + count]
        place += count
        if place < len(block):
            back = int.from_bytes(block[place : place + 2], "little")
            place += 2
            for _ in range(more(token & 15) + 4):
                out.append(out[-back])
