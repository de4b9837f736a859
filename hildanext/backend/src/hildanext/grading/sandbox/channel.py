"""Messages over two pipes: length, nonce, payload. A frame that is too long or has another nonce is the last."""

import os
import struct

HEADER = struct.Struct(">I16s")


class Closed(Exception):
    """The other side is gone."""


class BadFrame(Exception):
    """Bytes that are no frame of this conversation."""


class Channel:
    """One side of the conversation. `receive` holds at most one frame; nothing is read ahead."""

    def __init__(self, read_from: int, write_to: int, nonce: bytes, most_bytes: int) -> None:
        self.read_from = read_from
        self.write_to = write_to
        self.nonce = nonce
        self.most_bytes = most_bytes

    def send(self, payload: bytes) -> None:
        """Raises `Closed`; the payload may be of any length, the other side decides what is too long."""
        data = memoryview(HEADER.pack(len(payload), self.nonce) + payload)
        try:
            while data:
                data = data[os.write(self.write_to, data) :]
        except OSError:
            raise Closed from None

    def receive(self) -> bytes:
        """The next payload. Raises `Closed` at the end of the pipe, also inside a frame, and `BadFrame`."""
        length, nonce = HEADER.unpack(self._exactly(HEADER.size))
        if nonce != self.nonce:
            raise BadFrame("bytes that are no message")
        if length > self.most_bytes:
            raise BadFrame(f"a message of {length} bytes")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            try:
                part = os.read(self.read_from, min(count, 1 << 16))
            except OSError:
                raise Closed from None
            if not part:
                raise Closed
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
