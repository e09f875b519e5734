"""Reads the rows of an SQLite file without SQLite, for when a page is damaged and SQLite gives none of them.

Every page is read as a leaf of a table, whatever it says it is, and every cell that parses is given: only what the
reader can authenticate is a row. A log beside the file (WAL) is laid over it, its committed pages only.

Source: https://www.sqlite.org/fileformat2.html, sections 1.6 (b-tree pages), 2.1 (record format) and 4.1 (WAL format).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
"""Bytes of a page; a store's database is made with it."""


def rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and blob of all that looks like a row (id INTEGER PRIMARY KEY, BLOB)."""
    pages = _pages(path)
    for number, page in pages.items():
        head = 100 if number == 1 else 0
        n_cells = min(int.from_bytes(page[head + 3 : head + 5], "big"), (PAGE - head - 8) // 2)
        for i in range(n_cells):
            at = head + 8 + 2 * i
            try:
                yield _row(page, int.from_bytes(page[at : at + 2], "big"), pages)
            except (IndexError, KeyError, ValueError):
                continue


def _pages(path: Path) -> dict[int, bytes]:
    """Every whole page by its number, as of the last commit in the log."""
    raw = path.read_bytes()
    pages = {i + 1: raw[i * PAGE : (i + 1) * PAGE] for i in range(len(raw) // PAGE)}
    log = path.with_name(f"{path.name}-wal")
    raw = log.read_bytes() if log.exists() else b""
    salt, waiting = raw[40:48], dict[int, bytes]()
    for at in range(32, len(raw) - PAGE - 23, PAGE + 24):
        if raw[at + 8 : at + 16] != salt:  # of an older round of the log
            continue
        number, size = (int.from_bytes(raw[at + i : at + i + 4], "big") for i in (0, 4))
        waiting[number] = raw[at + 24 : at + 24 + PAGE]
        if size:  # a commit, and how many pages the file has then
            pages = {n: page for n, page in (pages | waiting).items() if n <= size}
            waiting.clear()
    return pages


def _row(page: bytes, at: int, pages: dict[int, bytes]) -> tuple[int, bytes]:
    size, at = _varint(page, at)
    number, at = _varint(page, at)
    if size > len(pages) * PAGE:
        raise ValueError
    local = size
    if size > PAGE - 35:  # the rest is in a chain of pages
        least = (PAGE - 12) * 32 // 255 - 23
        local = least + (size - least) % (PAGE - 4)
        local = local if local <= PAGE - 35 else least
    payload = bytearray(page[at : at + local])
    following = int.from_bytes(page[at + local : at + local + 4], "big")
    while len(payload) < size:
        link = pages[following]
        following = int.from_bytes(link[:4], "big")
        payload += link[4 : 4 + size - len(payload)]
    length, at = _varint(payload, 0)
    id_type, at = _varint(payload, at)
    blob_type, at = _varint(payload, at)
    if at != length or id_type != 0 or blob_type < 12 or blob_type % 2:  # an id is stored as the row's number alone
        raise ValueError
    blob = bytes(payload[length:])
    if len(blob) != (blob_type - 12) // 2:
        raise ValueError
    return number, blob


def _varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """A number of 1 to 9 bytes, and where it ends."""
    value = 0
    for i in range(8):
        value = value << 7 | data[at + i] & 0x7F
        if data[at + i] < 0x80:
            return value, at + i + 1
    return value << 8 | data[at + 8], at + 9
