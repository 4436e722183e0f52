"""Reads TensorBoard event files without TensorFlow: frames, checksums, protobufs.

    tfevents_read.py FILE...    prints one JSON object an event
"""

import json
import struct
import sys

TABLE = []
for byte in range(256):
    crc = byte
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    TABLE.append(crc)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


def unmask(masked):
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def frames(data):
    while data:
        (length,) = struct.unpack_from("<Q", data)
        header_crc, payload_crc = struct.unpack_from(f"<I{length}xI", data, 8)
        payload = data[12 : 12 + length]
        assert unmask(header_crc) == crc32c(data[:8])
        assert unmask(payload_crc) == crc32c(payload)
        yield payload
        data = data[16 + length :]


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            return value, at


def fields(data):
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = varint(data, at)
        elif wire == 1:
            (value,) = struct.unpack_from("<d", data, at)
            at += 8
        elif wire == 5:
            (value,) = struct.unpack_from("<f", data, at)
            at += 4
        else:
            assert wire == 2, wire
            length, at = varint(data, at)
            value = data[at : at + length]
            assert len(value) == length
            at += length
        yield field, value


def event(payload):
    seen = {"step": 0, "values": {}}
    for field, value in fields(payload):
        if field == 1:
            seen["time"] = value
        elif field == 2:
            seen["step"] = value
        elif field == 3:
            seen["version"] = value.decode()
        elif field == 5:
            for number, entry in fields(value):
                assert number == 1
                scalar = dict(fields(entry))
                assert scalar.keys() == {1, 2}, scalar.keys()
                seen["values"][scalar[1].decode()] = scalar[2]
        elif field == 7:
            seen["session"] = dict(fields(value))[1]
        else:
            raise AssertionError(f"field {field}")
    return seen


for path in sys.argv[1:]:
    with open(path, "rb") as file:
        for payload in frames(file.read()):
            print(json.dumps(event(payload)))

try:
    from tensorboard.backend.event_processing import event_file_loader
except ImportError:
    pass
else:
    for path in sys.argv[1:]:
        assert len(list(event_file_loader.EventFileLoader(path).Load())) > 0
