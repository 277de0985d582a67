"""What the library wandb has written offline, read without its reader: LevelDB's log format around protobuf records."""

import json
import struct
from pathlib import Path
from typing import Any

BLOCK, MAGIC, HEADER = 32768, b":W&B", 7  # bytes; the file's header is as long as a record's


def _payloads(data: bytes) -> list[bytes]:
    """The records, whole: kinds are 1 full, 2 first, 3 middle, 4 last part."""
    assert data.startswith(MAGIC)
    whole, parts, at = [], b"", HEADER
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no record begins so near a block's end
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            whole.append(parts)
            parts = b""
    return whole


def records(file: Path) -> dict[str, Any]:
    """``run`` (id, project, name), ``config`` (name to value) and ``history`` (a dict per call of ``log``)."""
    from wandb.proto.wandb_internal_pb2 import Record

    told: dict[str, Any] = {"run": {}, "config": {}, "history": []}
    for payload in _payloads(file.read_bytes()):
        record = Record.FromString(payload)
        if record.HasField("run"):
            named = ("run_id", "project", "display_name")
            told["run"] |= {name: getattr(record.run, name) for name in named}
            told["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            told["history"].append(row)
    return told
