"""Generates the Python of each .proto, beside it. A test holds that what is there is what this gives.

Only messages are generated: clients and servers name the methods themselves, so that no version of grpcio is asked for
beyond the package's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("penchant/common/artifacts/distribution.proto",)


def generate(into: Path) -> list[Path]:
    """The files made, in a folder that mirrors `common`."""
    made = []
    for proto in PROTOS:
        if protoc.main(["protoc", f"-I{ROOT / 'common'}", f"--python_out={into}", f"--pyi_out={into}", proto]):
            sys.exit(f"protoc refused {proto}; its message stands above")
        stem = into / proto.removesuffix(".proto")
        made += [stem.with_name(f"{stem.name}_pb2{suffix}") for suffix in (".py", ".pyi")]
    return made


if __name__ == "__main__":
    for path in generate(ROOT / "common"):
        print(path.relative_to(ROOT))
